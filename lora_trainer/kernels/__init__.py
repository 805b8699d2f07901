"""The mathematics of a fast step: fused LoRA products, norms and gates, in plain torch and in Triton."""
