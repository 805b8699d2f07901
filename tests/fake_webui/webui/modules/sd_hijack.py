import torch
from modules import sd_hijack_clip, sd_hijack_open_clip


class EmbeddingDatabase:
    """It has none."""

    def find_embedding_at_position(self, tokens, offset):
        return None, None


class StableDiffusionModelHijack:
    fixes = None
    clip = None
    embedding_db = EmbeddingDatabase()

    def hijack(self, m):
        if hasattr(m, "conditioner"):
            texts = len(m.conditioner.embedders) - 1
            for i in range(texts):
                m.conditioner.embedders[i] = self.wrap(m.conditioner.embedders[i])
            m.cond_stage_model = m.conditioner if texts > 1 else m.conditioner.embedders[0]
        else:
            m.cond_stage_model = self.wrap(m.cond_stage_model)
        self.clip = m.cond_stage_model

    def undo_hijack(self, m):
        if hasattr(m, "conditioner"):
            for i in range(len(m.conditioner.embedders) - 1):
                m.conditioner.embedders[i] = self.unwrap(m.conditioner.embedders[i])
            del m.cond_stage_model
        else:
            m.cond_stage_model = self.unwrap(m.cond_stage_model)
        self.clip = None

    def wrap(self, embedder):
        owner, kind = embedding_of(embedder)
        owner.token_embedding = EmbeddingsWithFixes(owner.token_embedding, self)
        return kind(embedder, self)

    def unwrap(self, embedder):
        owner, _ = embedding_of(embedder.wrapped)
        owner.token_embedding = owner.token_embedding.wrapped
        return embedder.wrapped


def embedding_of(embedder):
    """The module that has the token embedding, and the wrapper of such an embedder."""
    if hasattr(embedder, "transformer"):
        sdxl = embedder.layer == "hidden"
        kinds = (
            sd_hijack_clip.FrozenCLIPEmbedderWithCustomWords,
            sd_hijack_clip.FrozenCLIPEmbedderForSDXLWithCustomWords,
        )
        return embedder.transformer.text_model.embeddings, kinds[sdxl]
    if embedder.return_pooled:
        return embedder.model, sd_hijack_open_clip.FrozenOpenCLIPEmbedder2WithCustomWords
    return embedder.model, sd_hijack_open_clip.FrozenOpenCLIPEmbedderWithCustomWords


class EmbeddingsWithFixes(torch.nn.Module):
    def __init__(self, wrapped, embeddings, textual_inversion_key="clip_l"):
        super().__init__()
        self.wrapped = wrapped
        self.embeddings = embeddings
        self.textual_inversion_key = textual_inversion_key

    def forward(self, input_ids):
        return self.wrapped(input_ids)


model_hijack = StableDiffusionModelHijack()
