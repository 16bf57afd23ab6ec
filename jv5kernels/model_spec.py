"""ModelSpec: the architecture of a Qwen3 or EuroBERT backbone, read from config.json and tensor names alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LINEARS", "ModelSpec"]

# The linear layers of one layer, under its prefix "layers.N.".
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

# What Transformers assumes where config.json leaves a key out.
DEFAULT_ROPE_THETA = 10_000.0
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    "eurobert": {"head_dim": None, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192},
}


@dataclass(frozen=True)
class ModelSpec:
    """What distinguishes one backbone from another.

    Args:
        model_type: "qwen3" or "eurobert", the Transformers class that computes the same.
        causal: whether a token attends to earlier tokens only.
        qk_norm: whether q and k are normalised per head before RoPE.
        rope_theta: base of the rotary frequencies.

    The rest are the sizes that config.json gives under similar names.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    causal: bool
    qk_norm: bool
    max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: RoPE rotates pairs")

    @property
    def q_width(self) -> int:
        """Columns of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Columns of the fused projection."""
        return self.q_width + 2 * self.kv_width

    @property
    def num_matrices(self) -> int:
        """Linear layers of the whole model: what an adapter of all seven targets changes."""
        return len(LINEARS) * self.num_layers

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Canonical weight name -> (out, in) of every linear layer."""
        c, f = self.hidden_size, self.intermediate_size
        shapes = (
            (self.q_width, c),
            (self.kv_width, c),
            (self.kv_width, c),
            (c, self.q_width),
            (f, c),
            (f, c),
            (c, f),
        )
        return {
            f"layers.{i}.{linear}.weight": shape
            for i in range(self.num_layers)
            for linear, shape in zip(LINEARS, shapes, strict=True)
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor of the backbone, as Transformers names them."""
        c = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, c)}
        shapes.update(self.matrix_shapes())
        for i in range(self.num_layers):
            shapes[f"layers.{i}.input_layernorm.weight"] = (c,)
            shapes[f"layers.{i}.post_attention_layernorm.weight"] = (c,)
            if self.qk_norm:
                shapes[f"layers.{i}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"layers.{i}.self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["norm.weight"] = (c,)
        return shapes

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensor_names: Collection[str]) -> ModelSpec:
        """Reads the architecture of a checkpoint.

        Args:
            config: config.json as a dict.
            tensor_names: names of the checkpoint's tensors, with or without a prefix.

        Raises:
            ValueError: a key is missing, or says something that is not supported; named in the message.

        Example:
            >>> ModelSpec.from_config(json.load(open("config.json")), names).rope_theta
            3500000.0
        """
        family = _family(config)
        _refuse_unsupported(config)
        qk_norm = any(name.endswith("self_attn.q_norm.weight") for name in tensor_names)
        if qk_norm != (family == "qwen3"):
            state = "hold" if qk_norm else "do not hold"
            raise ValueError(
                f"config.json describes a {family} model (model_type={config['model_type']!r}, "
                f"is_decoder={config.get('is_decoder')!r}), but the tensors {state} q_norm weights"
            )
        defaults = DEFAULTS[family]
        heads = _size(config, "num_attention_heads")
        hidden = _size(config, "hidden_size")
        head_dim = config.get("head_dim", defaults["head_dim"])
        if family == "eurobert" and config.get("num_key_value_heads") is None:
            config = {**config, "num_key_value_heads": heads}
        return cls(
            model_type=family,
            hidden_size=hidden,
            num_layers=_size(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_size(config, "num_key_value_heads"),
            head_dim=hidden // heads
            if head_dim is None
            else _size({"head_dim": head_dim}, "head_dim"),
            intermediate_size=_size(config, "intermediate_size"),
            vocab_size=_size(config, "vocab_size"),
            rope_theta=_rope_theta(config),
            rms_norm_eps=float(config.get("rms_norm_eps", defaults["rms_norm_eps"])),
            causal=family == "qwen3" and config.get("is_causal") is not False,
            qk_norm=qk_norm,
            max_position_embeddings=_size({**defaults, **config}, "max_position_embeddings"),
        )


def _family(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    if model_type == "jina_embeddings_v5":
        # One model_type for both sizes: this key alone tells the bidirectional backbone apart.
        return "eurobert" if config.get("is_decoder") is False else "qwen3"
    if model_type in ("qwen3", "eurobert"):
        return model_type
    raise ValueError(
        f"config.json: model_type={model_type!r} is not supported; "
        "supported are 'jina_embeddings_v5', 'qwen3' and 'eurobert'"
    )


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The RoPE dict under its old or its new key; Transformers lets the old one win."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rope_theta(config: Mapping[str, Any]) -> float:
    theta = _rope_parameters(config).get("rope_theta", config.get("rope_theta", DEFAULT_ROPE_THETA))
    if not isinstance(theta, (int, float)) or isinstance(theta, bool) or theta <= 0:
        raise ValueError(f"config.json: rope_theta must be a positive number, not {theta!r}")
    return float(theta)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raises for settings that would change the embeddings and that the backbone does not compute."""
    rope = _rope_parameters(config)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    layers = config.get("num_hidden_layers", 0)
    slides = config.get("use_sliding_window") and config.get("sliding_window") is not None
    kinds = config.get("layer_types")
    if kinds is None and slides and config.get("max_window_layers", 28) < layers:
        kinds = ["sliding_attention"]
    problems = {
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "rope_scaling" if config.get("rope_scaling") else "rope_parameters": (
            rope_type != "default" or any(isinstance(value, dict) for value in rope.values())
        ),
        "partial_rotary_factor": rotated not in (None, 1, 1.0),
        "layer_types" if config.get("layer_types") else "sliding_window": (
            any(kind != "full_attention" for kind in kinds or ())
        ),
        "quantization_config": bool(config.get("quantization_config")),
    }
    for key, refused in problems.items():
        if refused:
            raise ValueError(
                f"config.json: {key}={config.get(key, rope.get(key))!r} is not supported"
            )
