"""Tokenizers and text encoders of language models, with bytes as their vocabulary."""

from __future__ import annotations

from typing import Any

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_pad|>",
)
TEMPLATE = (
    "{% for m in messages %}"
    "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}"
    "{% endfor %}"
)
"""Template of a chat that gives the texts only."""


def byte_entries() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    vocabulary = {entry: index for index, entry in enumerate([*byte_entries(), *SPECIAL])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        model_max_length=4096,
        additional_special_tokens=list(SPECIAL[1:]),
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def byte_tokenizer(side: str = "right", length: int = 64) -> Any:
    """A tokenizer of bytes for encoders whose models have one of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ("<pad>", "<eos>", "<bos>", "<unk>")
    vocabulary = {entry: index for index, entry in enumerate([*marks, *byte_entries()])}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=length,
        padding_side=side,
    )


def character_tokenizer(name: str, marks: tuple[str, ...], length: int) -> Any:
    """A tokenizer of printable characters, of a class of transformers."""
    import transformers

    characters = [chr(code) for code in range(33, 127)]
    entries = [*marks, *characters, "▁", "\n"]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    return getattr(transformers, name)(vocab=vocabulary, merges=[], model_max_length=length)


def qwen3(causal: bool = False) -> tuple[Any, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    tokenizer = qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
    )
    return tokenizer, Qwen3ForCausalLM(config) if causal else Qwen3Model(config)


def qwen25_vl_config(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1e6,
    }
    image = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    special = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=image,
        image_token_id=special("<|image_pad|>"),
        video_token_id=special("<|video_pad|>"),
        vision_start_token_id=special("<|vision_start|>"),
        vision_end_token_id=special("<|vision_end|>"),
    )


def qwen25_vl() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    return tokenizer, Qwen2_5_VLForConditionalGeneration(qwen25_vl_config(tokenizer))


def gemma2() -> tuple[Any, Any]:
    from transformers import Gemma2Config, Gemma2Model

    marks = ("<pad>", "<eos>", "<bos>", "<unk>")
    tokenizer = character_tokenizer("GemmaTokenizer", marks, length=32)
    options: dict[str, Any] = {"attn_implementation": "eager"}
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        head_dim=16,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=2,
        **options,
    )
    return tokenizer, Gemma2Model(config)


def gemma3() -> tuple[Any, Any]:
    """Gemma 3 with its image encoder, which text-only pipelines load and do not call."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    marks = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>", "</image>", "<patch>")
    tokenizer = character_tokenizer("GemmaTokenizer", marks, length=32)
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 64,
        "max_position_embeddings": 1024,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=4,
        eoi_token_index=5,
        image_token_index=6,
    )
    return tokenizer, Gemma3ForConditionalGeneration(config)


def llama() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaModel

    tokenizer = character_tokenizer("LlamaTokenizer", ("<unk>", "<s>", "</s>"), length=64)
    tokenizer.pad_token = "</s>"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return tokenizer, LlamaModel(config)


def glm() -> tuple[Any, Any]:
    from transformers import GlmConfig, GlmModel

    tokenizer = byte_tokenizer(side="left")
    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    return tokenizer, GlmModel(config)


def umt5() -> tuple[Any, Any]:
    """The T5 tokenizer with the encoder of the multilingual T5."""
    from transformers import UMT5Config, UMT5EncoderModel

    from tests.families.pipelines import t5

    tokenizer, _ = t5()
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_ff=32, d_kv=8, num_heads=4, num_layers=1
    )
    return tokenizer, UMT5EncoderModel(config)
