"""Tiny random models and files for tests, written with the `gguf` and `safetensors` packages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"))
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyLlama:
    """Shapes of a llama that runs in microseconds; its rows are whole blocks of 32."""

    hidden_size: int = 64
    intermediate_size: int = 96
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    max_position_embeddings: int = 256
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    seed: int = 0

    @property
    def vocab_size(self) -> int:
        return len(tiny_vocab())


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters.update({byte: chr(256 + index) for index, byte in enumerate(unprintable)})
    return [characters[byte] for byte in range(256)]


def tiny_vocab() -> list[str]:
    """Token texts by id: the special tokens, the 256 bytes, and one per merge."""
    return [*SPECIAL_TOKENS, *byte_alphabet(), *(left + right for left, right in MERGES)]


def tiny_llama_tensors(config: TinyLlama | None = None) -> dict[str, np.ndarray]:
    """Random float32 weights by Hugging Face checkpoint key; norm weights are not all ones."""
    config = config or TinyLlama()
    rng = np.random.default_rng(config.seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(config.hidden_size)).astype(np.float32)

    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    tensors = {"model.embed_tokens.weight": matrix(config.vocab_size, hidden), "model.norm.weight": norm()}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = matrix(config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        tensors |= {
            f"model.layers.{layer}.{name}.weight": weight
            for name, weight in {
                "input_layernorm": norm(),
                "self_attn.q_proj": matrix(config.num_attention_heads * head, hidden),
                "self_attn.k_proj": matrix(config.num_key_value_heads * head, hidden),
                "self_attn.v_proj": matrix(config.num_key_value_heads * head, hidden),
                "self_attn.o_proj": matrix(hidden, config.num_attention_heads * head),
                "post_attention_layernorm": norm(),
                "mlp.gate_proj": matrix(inner, hidden),
                "mlp.up_proj": matrix(inner, hidden),
                "mlp.down_proj": matrix(hidden, inner),
            }.items()
        }
    return tensors


def tiny_llama_folder(path: Path, config: TinyLlama | None = None, num_shards: int = 1) -> Path:
    """Write the model as a Hugging Face folder, float32, in one file or several with an index."""
    config = config or TinyLlama()
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", _hf_config(config))
    _write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[1],
            "eos_token": SPECIAL_TOKENS[2],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    tiny_tokenizer().save(str(path / "tokenizer.json"))
    _save_shards(path, tiny_llama_tensors(config), num_shards)
    return path


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE over `tiny_vocab`, with GPT-2's pre-tokenizer."""
    vocab = {text: token_id for token_id, text in enumerate(tiny_vocab())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    )
    return tokenizer


def tiny_llama_gguf(path: Path, config: TinyLlama | None = None, format_name: str = "F32") -> Path:
    """Write the same model as GGUF: matrices in `format_name`, q and k rows permuted as llama.cpp does."""
    config = config or TinyLlama()
    writer = GGUFWriter(path, "llama")
    _add_llama_metadata(writer, config)
    add_tokenizer(writer)
    for name, weight in tiny_llama_tensors(config).items():
        if "q_proj" in name:
            weight = permute_rope_rows(weight, config.num_attention_heads)
        elif "k_proj" in name:
            weight = permute_rope_rows(weight, config.num_key_value_heads)
        add_tensor(writer, gguf_name(name), weight, "F32" if weight.ndim == 1 else format_name)
    return write_gguf(writer, path)


def add_tensor(writer: GGUFWriter, name: str, values: np.ndarray, format_name: str) -> None:
    """Quantise `values` with the gguf package and add them."""
    ggml_type = GGMLQuantizationType[format_name]
    writer.add_tensor(name, quants.quantize(values, ggml_type), raw_dtype=ggml_type)


def write_gguf(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute_rope_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from halves (i, i + d/2) to interleaved pairs (2i, 2i + 1)."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def gguf_name(hf_name: str) -> str:
    """The GGUF name of a llama's checkpoint key."""
    parts = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for part, replacement in parts.items():
        hf_name = hf_name.replace(part, replacement)
    return hf_name


def _hf_config(config: TinyLlama) -> dict[str, object]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def _add_llama_metadata(writer: GGUFWriter, config: TinyLlama) -> None:
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer: GGUFWriter, vocab_size: int = 0) -> None:
    """The tiny tokenizer; ids from the end of its vocabulary to `vocab_size` are unused."""
    vocab = tiny_vocab()
    unused = [f"[PAD{token_id}]" for token_id in range(len(vocab), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocab + unused)
    types = [TokenType.CONTROL if text in SPECIAL_TOKENS else TokenType.NORMAL for text in vocab]
    writer.add_token_types(types + [TokenType.UNUSED] * len(unused))
    writer.add_token_merges([f"{left} {right}" for left, right in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _save_shards(path: Path, tensors: dict[str, np.ndarray], num_shards: int) -> None:
    if num_shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::num_shards])
        save_file(part, path / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    total_size = sum(weight.nbytes for weight in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(path / "model.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
