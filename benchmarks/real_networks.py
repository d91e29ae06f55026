"""Networks as people have them, with random weights: what each is made from, and its inputs.

Each is loaded as it is. Its library is imported when it is made; one that is missing is a `ModuleNotFoundError`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch

__all__ = ["ZOO", "Call", "Entry"]

#: Positional and named inputs of a call.
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
Make: TypeAlias = Callable[[torch.device], Any]
Inputs: TypeAlias = Callable[[torch.device], Call]


@dataclass(frozen=True)
class Entry:
    """One network.

    Attributes:
        name: with its library first.
        make: makes it on a device, ready for inference.
        calls: each makes new inputs; one for each signature or shape.
        is_exact: whether eager repeats itself bit for bit.
    """

    name: str
    make: Make
    calls: Sequence[Inputs]
    is_exact: bool = True


def _ready(module: Any, device: torch.device) -> Any:
    return module.eval().to(device)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Inputs:
    return lambda device: ((torch.randn(shape, device=device, dtype=dtype),), {})


def _ids(batch: int, length: int, **more: Callable[[torch.device], Any]) -> Inputs:
    def made(device: torch.device) -> Call:
        named = {"input_ids": torch.randint(0, 100, (batch, length), device=device)}
        return (), named | {key: value(device) for key, value in more.items()}

    return made


def _masked(batch: int, length: int, **more: Callable[[torch.device], Any]) -> Inputs:
    return _ids(
        batch, length, attention_mask=lambda device: torch.ones(batch, length, dtype=torch.int64, device=device), **more
    )


def _named(**values: Callable[[torch.device], Any]) -> Inputs:
    return lambda device: ((), {name: value(device) for name, value in values.items()})


def _normal(*shape: int) -> Callable[[torch.device], Any]:
    return lambda device: torch.randn(shape, device=device)


def _vision(name: str, part: str = "", **options: Any) -> Make:
    """A network of torchvision."""
    weights = {"weights": None} | ({"weights_backbone": None} if part in ("detection", "segmentation") else {})

    def made(device: torch.device) -> Any:
        models = importlib.import_module("torchvision.models" + (f".{part}" if part else ""))
        return _ready(getattr(models, name)(**weights, **options), device)

    return made


def _half(make: Make) -> Make:
    return lambda device: make(device).half()


def _timm(name: str) -> Make:
    return lambda device: _ready(importlib.import_module("timm").create_model(name, pretrained=False), device)


def _hugging(name: str, config: str, part: str = "", **options: Any) -> Make:
    """A network of transformers, or a part of it."""

    def made(device: torch.device) -> Any:
        library = importlib.import_module("transformers")
        options_made = {key: value(library) if callable(value) else value for key, value in options.items()}
        network = getattr(library, name)(getattr(library, config)(**options_made))
        return _ready(getattr(network, part) if part else network, device)

    return made


class _First(torch.nn.Module):
    """A detector for one image, as people wrap it: (1, 3, h, w) to boxes, scores and labels."""

    def __init__(self, detector: torch.nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = self.detector([x[0]])[0]
        return found["boxes"], found["scores"], found["labels"]


class _Suppressed(torch.nn.Module):
    """Boxes through non-maximum suppression, whose number of results the host must see."""

    def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        keep = importlib.import_module("torchvision.ops").nms(corners, scores, 0.5)
        return corners[keep], scores[keep]


class _Convolved(torch.nn.Module):
    """Two graph convolutions of torch_geometric."""

    def __init__(self) -> None:
        super().__init__()
        layers = importlib.import_module("torch_geometric.nn")
        self.first, self.second = layers.GCNConv(16, 32), layers.GATConv(32, 8)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x, edges).relu(), edges)
        return result


def _images(*sizes: int) -> Inputs:
    return lambda device: (([torch.rand(3, size, size, device=device) for size in sizes],), {})


def _graph(device: torch.device) -> Call:
    return (torch.randn(50, 16, device=device), torch.randint(0, 50, (2, 200), device=device)), {}


def _after(*, batch: int, length: int) -> Inputs:
    """One token, and the cache of those before it."""

    def made(device: torch.device) -> Call:
        library = importlib.import_module("transformers")
        cache = library.DynamicCache()
        for layer in range(_LAYERS):
            cache.update(*(torch.randn(batch, _HEADS, length, _WIDTH // _HEADS, device=device) for _ in range(2)), layer)
        ids = torch.randint(0, 100, (batch, 1), device=device)
        return (), {"input_ids": ids, "past_key_values": cache, "use_cache": True}

    return made


def _exported(device: torch.device) -> Any:
    return torch.export.export(_vision("resnet18")(device), (torch.randn(1, 3, 224, 224, device=device),))


def _traced(device: torch.device) -> Any:
    return torch.jit.trace(_vision("resnet18")(device), torch.randn(1, 3, 224, 224, device=device))


def _state(device: torch.device) -> Call:
    state = (torch.randn(2, 2, 128, device=device), torch.randn(2, 2, 128, device=device))
    return (torch.randn(2, 20, 64, device=device), state), {}


_WIDTH, _HEADS, _LAYERS = 256, 4, 3
_SMALL: Final[Mapping[str, Any]] = {
    "hidden_size": _WIDTH, "num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS, "intermediate_size": 512,
}  # fmt: skip
_TEXT: Final[Mapping[str, Any]] = {**_SMALL, "vocab_size": 1000}
_GPT: Final[Mapping[str, Any]] = {
    "n_embd": _WIDTH, "n_layer": _LAYERS, "n_head": _HEADS, "vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_LLAMA: Final[Mapping[str, Any]] = {**_TEXT, "num_key_value_heads": _HEADS}
_SEQ2SEQ: Final[Mapping[str, Any]] = {
    "d_model": _WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": _HEADS,
    "decoder_attention_heads": _HEADS, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512,
}  # fmt: skip
_WAVE: Final[Mapping[str, Any]] = {**_SMALL}
_DECODED: Final[Inputs] = _ids(1, 16, decoder_input_ids=lambda device: torch.randint(0, 100, (1, 4), device=device))
_SOUND: Final[Inputs] = _named(input_values=_normal(1, 16000))
_PICTURE, _PICTURES = _random(1, 3, 224, 224), _random(3, 3, 224, 224)

ZOO: Final[Sequence[Entry]] = (
    Entry("torchvision resnet50", _vision("resnet50"), [_PICTURE, _random(4, 3, 224, 224)]),
    Entry(
        "torchvision resnet50 fp16",
        _half(_vision("resnet50")),
        [_random(n, 3, 224, 224, dtype=torch.float16) for n in (1, 8)],
    ),
    Entry("torchvision mobilenet_v3_large", _vision("mobilenet_v3_large"), [_PICTURE, _random(2, 3, 224, 224)]),
    Entry("torchvision efficientnet_b0", _vision("efficientnet_b0"), [_PICTURE]),
    Entry("torchvision swin_t", _vision("swin_t"), [_PICTURE, _random(2, 3, 224, 224)]),
    Entry("torchvision vit_b_16", _vision("vit_b_16"), [_PICTURE]),
    Entry("torchvision convnext_tiny", _vision("convnext_tiny"), [_PICTURE]),
    Entry("torchvision googlenet", _vision("googlenet", init_weights=False), [_PICTURE]),
    Entry(
        "torchvision deeplabv3 (dict)", _vision("deeplabv3_resnet50", "segmentation"), [_PICTURE, _random(1, 3, 320, 320)]
    ),
    Entry("torchvision fcn_resnet50 (dict)", _vision("fcn_resnet50", "segmentation"), [_PICTURE]),
    Entry("torchvision lraspp (dict)", _vision("lraspp_mobilenet_v3_large", "segmentation"), [_PICTURE]),
    Entry(
        "torchvision fasterrcnn (list of images)",
        _vision("fasterrcnn_resnet50_fpn", "detection"),
        [_images(320), _images(320, 256)],
    ),
    Entry("torchvision maskrcnn (list of images)", _vision("maskrcnn_resnet50_fpn", "detection"), [_images(320)]),
    Entry("torchvision keypointrcnn (list of images)", _vision("keypointrcnn_resnet50_fpn", "detection"), [_images(320)]),
    Entry("torchvision fcos (list of images)", _vision("fcos_resnet50_fpn", "detection"), [_images(320)]),
    Entry("torchvision ssdlite (list of images)", _vision("ssdlite320_mobilenet_v3_large", "detection"), [_images(320)]),
    Entry(
        "torchvision retinanet, wrapped",
        lambda device: _First(_vision("retinanet_resnet50_fpn", "detection")(device)).eval(),
        [lambda device: ((torch.rand(1, 3, 320, 320, device=device),), {})],
    ),
    Entry(
        "torchvision boxes through NMS",
        lambda device: _Suppressed(),
        [
            lambda device: ((torch.rand(500, 4, device=device) * 100, torch.rand(500, device=device)), {}),
        ],
    ),
    Entry(
        "torchvision raft_small (list)",
        _vision("raft_small", "optical_flow"),
        [
            lambda device: ((torch.rand(1, 3, 128, 128, device=device), torch.rand(1, 3, 128, 128, device=device)), {}),
        ],
    ),
    Entry("torchvision r3d_18 (video)", _vision("r3d_18", "video"), [_random(1, 3, 8, 112, 112)]),
    Entry("torchvision mvit_v2_s (video)", _vision("mvit_v2_s", "video"), [_random(1, 3, 16, 224, 224)]),
    Entry("timm vit_small", _timm("vit_small_patch16_224"), [_PICTURE, _PICTURES]),
    Entry("timm convnext_tiny", _timm("convnext_tiny"), [_PICTURE]),
    Entry("timm maxvit_tiny", _timm("maxvit_tiny_rw_224"), [_PICTURE]),
    Entry("timm deit3_small", _timm("deit3_small_patch16_224"), [_PICTURE]),
    Entry("timm mixer_s32", _timm("mixer_s32_224"), [_PICTURE]),
    Entry("timm regnety_016", _timm("regnety_016"), [_PICTURE]),
    Entry("timm eva02_tiny", _timm("eva02_tiny_patch14_224"), [_PICTURE]),
    Entry(
        "transformers bert (ModelOutput)",
        _hugging("BertForSequenceClassification", "BertConfig", **_TEXT),
        [_masked(1, 32), _masked(2, 128)],
    ),
    Entry(
        "transformers bert, hidden states",
        _hugging("BertModel", "BertConfig", **_TEXT),
        [_masked(1, 32, output_hidden_states=lambda device: True)],
    ),
    Entry(
        "transformers distilbert",
        _hugging("DistilBertModel", "DistilBertConfig", dim=256, n_layers=3, n_heads=4, hidden_dim=512, vocab_size=1000),
        [_masked(1, 32)],
    ),
    Entry("transformers roberta", _hugging("RobertaForTokenClassification", "RobertaConfig", **_TEXT), [_masked(1, 32)]),
    Entry("transformers electra", _hugging("ElectraForQuestionAnswering", "ElectraConfig", **_TEXT), [_masked(1, 32)]),
    Entry("transformers gpt2", _hugging("GPT2LMHeadModel", "GPT2Config", **_GPT), [_masked(1, 16), _masked(1, 64)]),
    Entry(
        "transformers gpt2 after a cache",
        _hugging("GPT2LMHeadModel", "GPT2Config", **_GPT),
        [_after(batch=1, length=16), _after(batch=2, length=5)],
    ),
    Entry("transformers llama", _hugging("LlamaForCausalLM", "LlamaConfig", **_LLAMA), [_masked(1, 16)]),
    Entry(
        "transformers llama after a cache",
        _hugging("LlamaForCausalLM", "LlamaConfig", **_LLAMA),
        [_after(batch=1, length=16)],
    ),
    Entry(
        "transformers qwen2 after a cache",
        _hugging("Qwen2ForCausalLM", "Qwen2Config", **_LLAMA),
        [_after(batch=1, length=16)],
    ),
    Entry(
        "transformers t5 (encoder and decoder)",
        _hugging(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=1000,
            d_model=256,
            d_kv=64,
            d_ff=512,
            num_layers=2,
            num_heads=4,
        ),
        [_DECODED],
    ),
    Entry(
        "transformers bart (encoder and decoder)",
        _hugging("BartForConditionalGeneration", "BartConfig", vocab_size=1000, **_SEQ2SEQ),
        [_DECODED],
    ),
    Entry(
        "transformers clip (nested)",
        _hugging("CLIPModel", "CLIPConfig"),
        [
            _named(
                input_ids=lambda device: torch.randint(0, 49000, (2, 77), device=device),
                pixel_values=_normal(1, 3, 224, 224),
                attention_mask=lambda device: torch.ones(2, 77, dtype=torch.int64, device=device),
            ),
        ],
    ),
    Entry(
        "transformers siglip (nested)",
        _hugging(
            "SiglipModel",
            "SiglipConfig",
            text_config={**_TEXT, "max_position_embeddings": 64},
            vision_config={**_SMALL, "image_size": 224, "patch_size": 16},
        ),
        [
            _named(
                input_ids=lambda device: torch.randint(0, 900, (2, 64), device=device), pixel_values=_normal(1, 3, 224, 224)
            ),
        ],
    ),
    Entry(
        "transformers vilt (vision and language)",
        _hugging("ViltModel", "ViltConfig", **_TEXT),
        [
            _named(
                input_ids=lambda device: torch.randint(0, 900, (1, 16), device=device),
                pixel_values=_normal(1, 3, 224, 224),
                pixel_mask=lambda device: torch.ones(1, 224, 224, dtype=torch.int64, device=device),
            ),
        ],
        is_exact=False,
    ),  # it draws the patches that it looks at
    Entry(
        "transformers dinov2",
        _hugging("Dinov2Model", "Dinov2Config", **_SMALL),
        [_named(pixel_values=_normal(1, 3, 224, 224))],
    ),
    Entry(
        "transformers segformer",
        _hugging("SegformerForSemanticSegmentation", "SegformerConfig"),
        [_named(pixel_values=_normal(1, 3, 256, 256))],
    ),
    Entry(
        "transformers whisper, encoder",
        _hugging("WhisperModel", "WhisperConfig", "encoder", **_SEQ2SEQ),
        [_named(input_features=_normal(1, 80, 3000))],
    ),
    Entry(
        "transformers whisper",
        _hugging("WhisperModel", "WhisperConfig", **_SEQ2SEQ),
        [
            _named(
                input_features=_normal(1, 80, 3000),
                decoder_input_ids=lambda device: torch.randint(0, 100, (1, 4), device=device),
            ),
        ],
    ),
    Entry("transformers wav2vec2 (speech)", _hugging("Wav2Vec2ForCTC", "Wav2Vec2Config", **_WAVE), [_SOUND]),
    Entry("transformers hubert (speech)", _hugging("HubertModel", "HubertConfig", **_WAVE), [_SOUND]),
    Entry(
        "transformers ast (sound)", _hugging("ASTModel", "ASTConfig", **_SMALL), [_named(input_values=_normal(1, 1024, 128))]
    ),
    Entry(
        "transformers patchtst (time series)",
        _hugging("PatchTSTForPrediction", "PatchTSTConfig", num_input_channels=3, context_length=64, prediction_length=8),
        [
            _named(past_values=_normal(2, 64, 3)),
        ],
    ),
    Entry(
        "transformers mamba (state space)",
        _hugging("MambaModel", "MambaConfig", vocab_size=1000, hidden_size=128, num_hidden_layers=2),
        [_ids(1, 16)],
    ),
    Entry("torch.compile of resnet18", lambda device: torch.compile(_vision("resnet18")(device)), [_PICTURE]),
    Entry("torch.jit.trace of resnet18", _traced, [_PICTURE]),
    Entry("torch.export of resnet18", _exported, [_PICTURE]),
    Entry(
        "torch LSTM",
        lambda device: _ready(torch.nn.LSTM(64, 128, 2, batch_first=True), device),
        [_random(2, 20, 64), _state],
    ),
    Entry("torch GRU", lambda device: _ready(torch.nn.GRU(64, 128, 2, bidirectional=True), device), [_random(20, 2, 64)]),
    Entry(
        "torch TransformerEncoder",
        lambda device: _ready(
            torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(128, 4, 256, batch_first=True), 2), device
        ),
        [_random(2, 20, 128)],
    ),
    Entry(
        "torch Transformer",
        lambda device: _ready(torch.nn.Transformer(128, 4, 2, 2, 256, batch_first=True), device),
        [
            lambda device: ((torch.randn(2, 20, 128, device=device), torch.randn(2, 5, 128, device=device)), {}),
        ],
    ),
    Entry(
        "torch MultiheadAttention",
        lambda device: _ready(torch.nn.MultiheadAttention(128, 4, batch_first=True), device),
        [
            lambda device: ((torch.randn(2, 20, 128, device=device),) * 3, {"need_weights": False}),
        ],
    ),
    Entry("torch_geometric GCN and GAT", lambda device: _ready(_Convolved(), device), [_graph], is_exact=False),  # atomics
    Entry(
        "torchaudio conformer",
        lambda device: _ready(importlib.import_module("torchaudio.models").Conformer(80, 4, 128, 2, 31), device),
        [
            lambda device: ((torch.randn(2, 50, 80, device=device), torch.tensor([50, 40], device=device)), {}),
        ],
    ),
    Entry(
        "torchaudio conv_tasnet",
        lambda device: _ready(importlib.import_module("torchaudio.models").conv_tasnet_base(), device),
        [_random(1, 1, 8000)],
    ),
)
