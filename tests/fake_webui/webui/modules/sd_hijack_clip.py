import torch
from modules import devices, prompt_parser
from modules.shared import opts


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
        """Chunks of 77 (token, weight) and how many tokens there are."""
        parsed = prompt_parser.parse_prompt_attention(line)
        chunks, chunk = [], []
        for tokens, (text, weight) in zip(self.tokenize([text for text, _ in parsed]), parsed, strict=True):
            if text == "BREAK" and weight == -1:
                chunks.append(chunk)
                chunk = []
                continue
            for token in tokens:
                if len(chunk) == self.chunk_length:
                    chunks.append(chunk)
                    chunk = []
                chunk.append((token, weight))
        if chunk or not chunks:
            chunks.append(chunk)
        end = (self.id_end, 1.0)
        framed = [[(self.id_start, 1.0), *c, *[end] * (self.chunk_length - len(c) + 1)] for c in chunks]
        return framed, sum(map(len, chunks))

    def forward(self, texts):
        batch = [self.tokenize_line(text)[0] for text in texts]
        empty = self.tokenize_line("")[0][0]
        count = max(map(len, batch))
        batch = [chunks + [empty] * (count - len(chunks)) for chunks in batch]
        parts = [[chunks[i] for chunks in batch] for i in range(count)]
        return torch.hstack(
            [self.process_tokens(*([[p[k] for p in chunk] for chunk in part] for k in (0, 1))) for part in parts]
        )

    def process_tokens(self, remade_batch_tokens, batch_multipliers):
        z = self.encode_with_transformers(torch.asarray(remade_batch_tokens).to(devices.device))
        # Emphasis "Original": the mean over the whole batch stays.
        weighted = z * torch.asarray(batch_multipliers).unsqueeze(-1)
        return weighted * (z.mean() / weighted.mean())


class FrozenCLIPEmbedderWithCustomWordsBase(TextConditionalModel):
    def __init__(self, wrapped, hijack):
        super().__init__()
        self.hijack = hijack
        self.wrapped = wrapped


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
