import torch
from modules import sd_hijack_clip


class EmbeddingDatabase:
    """It has none."""

    def find_embedding_at_position(self, tokens, offset):
        return None, None


class StableDiffusionModelHijack:
    fixes = None
    clip = None
    embedding_db = EmbeddingDatabase()

    def hijack(self, m):
        embeddings = m.cond_stage_model.transformer.text_model.embeddings
        embeddings.token_embedding = EmbeddingsWithFixes(embeddings.token_embedding, self)
        self.clip = m.cond_stage_model = sd_hijack_clip.FrozenCLIPEmbedderWithCustomWords(m.cond_stage_model, self)

    def undo_hijack(self, m):
        m.cond_stage_model = m.cond_stage_model.wrapped
        embeddings = m.cond_stage_model.transformer.text_model.embeddings
        embeddings.token_embedding = embeddings.token_embedding.wrapped
        self.clip = None


class EmbeddingsWithFixes(torch.nn.Module):
    def __init__(self, wrapped, embeddings, textual_inversion_key="clip_l"):
        super().__init__()
        self.wrapped = wrapped
        self.embeddings = embeddings
        self.textual_inversion_key = textual_inversion_key

    def forward(self, input_ids):
        return self.wrapped(input_ids)


model_hijack = StableDiffusionModelHijack()
