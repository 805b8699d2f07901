from collections import namedtuple

import torch
from modules import devices, prompt_parser
from modules.shared import opts


class PromptChunk:
    def __init__(self):
        self.tokens = []
        self.multipliers = []
        self.fixes = []


PromptChunkFix = namedtuple("PromptChunkFix", ["offset", "embedding"])


class TextConditionalModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.chunk_length = 75
        self.id_start = None
        self.id_end = None
        self.id_pad = None

    def tokenize(self, texts):
        raise NotImplementedError

    def encode_with_transformers(self, tokens):
        raise NotImplementedError

    def tokenize_line(self, line):
        """PromptChunks of 77 tokens, and how many there are."""
        parsed = [[line, 1.0]] if opts.emphasis == "None" else prompt_parser.parse_prompt_attention(line)
        chunks = [PromptChunk()]
        for tokens, (text, weight) in zip(self.tokenize([text for text, _ in parsed]), parsed, strict=True):
            if text == "BREAK" and weight == -1:
                chunks.append(PromptChunk())
                continue
            position = 0
            while position < len(tokens):
                if len(chunks[-1].tokens) == self.chunk_length:
                    chunks.append(PromptChunk())
                chunk = chunks[-1]
                embedding, length = self.hijack.embedding_db.find_embedding_at_position(tokens, position)
                if embedding is not None:
                    chunk.fixes.append(PromptChunkFix(len(chunk.tokens), embedding))
                chunk.tokens.append(tokens[position] if embedding is None else 0)
                chunk.multipliers.append(weight)
                position += length or 1
        if len(chunks) > 1 and not chunks[-1].tokens:
            chunks.pop()
        count = sum(len(chunk.tokens) for chunk in chunks)
        for chunk in chunks:
            missing = self.chunk_length - len(chunk.tokens)
            chunk.tokens = [self.id_start, *chunk.tokens, *[self.id_end] * (missing + 1)]
            chunk.multipliers = [1.0, *chunk.multipliers, *[1.0] * (missing + 1)]
        return chunks, count

    def forward(self, texts):
        batch = [self.tokenize_line(text)[0] for text in texts]
        empty = self.tokenize_line("")[0][0]
        count = max(map(len, batch))
        batch = [chunks + [empty] * (count - len(chunks)) for chunks in batch]
        parts = [[chunks[i] for chunks in batch] for i in range(count)]
        zs = [self.process_tokens([c.tokens for c in part], [c.multipliers for c in part]) for part in parts]
        return (torch.hstack(zs), zs[0].pooled) if self.return_pooled else torch.hstack(zs)

    def process_tokens(self, remade_batch_tokens, batch_multipliers):
        tokens = torch.asarray(remade_batch_tokens).to(devices.device)
        if self.id_end != self.id_pad:
            for row, own in zip(tokens, remade_batch_tokens, strict=True):
                row[own.index(self.id_end) + 1 :] = self.id_pad
        z = self.encode_with_transformers(tokens)
        pooled = getattr(z, "pooled", None)
        z = self.emphasized(z, batch_multipliers)
        if pooled is not None:
            z.pooled = pooled
        return z

    def emphasized(self, z, batch_multipliers):
        if opts.emphasis in ("None", "Ignore"):
            return z
        weighted = z * torch.asarray(batch_multipliers).unsqueeze(-1)
        # Emphasis "Original": the mean over the whole batch stays.
        return weighted if opts.emphasis == "No norm" else weighted * (z.mean() / weighted.mean())


class FrozenCLIPEmbedderWithCustomWordsBase(TextConditionalModel):
    def __init__(self, wrapped, hijack):
        super().__init__()
        self.hijack = hijack
        self.wrapped = wrapped
        self.return_pooled = getattr(wrapped, "return_pooled", False)


class FrozenCLIPEmbedderWithCustomWords(FrozenCLIPEmbedderWithCustomWordsBase):
    def __init__(self, wrapped, hijack):
        super().__init__(wrapped, hijack)
        self.tokenizer = wrapped.tokenizer
        self.id_start = wrapped.tokenizer.bos_token_id
        self.id_end = wrapped.tokenizer.eos_token_id
        self.id_pad = self.id_end

    def tokenize(self, texts):
        return self.wrapped.tokenizer(texts, truncation=False, add_special_tokens=False)["input_ids"]

    def encode_with_transformers(self, tokens):
        skip = opts.CLIP_stop_at_last_layers
        outputs = self.wrapped.transformer(input_ids=tokens, output_hidden_states=True)
        if skip == 1:
            return outputs.last_hidden_state
        return self.wrapped.transformer.text_model.final_layer_norm(outputs.hidden_states[-skip])


class FrozenCLIPEmbedderForSDXLWithCustomWords(FrozenCLIPEmbedderWithCustomWords):
    def encode_with_transformers(self, tokens):
        layers = self.wrapped.transformer(input_ids=tokens, output_hidden_states=True).hidden_states
        return layers[-opts.CLIP_stop_at_last_layers if opts.sdxl_clip_l_skip is True else self.wrapped.layer_idx]
