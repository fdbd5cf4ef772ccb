"""The families, by name: the only place that names transformers classes. One file and one line here add a family."""

from __future__ import annotations

from typing import Any

from mmcompress.bundle import Family
from mmcompress.errors import UsageError
from mmcompress.families import (
    altclip,
    blip,
    blip_retrieval,
    chinese_clip,
    clap,
    clip,
    dual_encoder,
    flava,
    layoutlm,
    llava,
    paligemma,
    qwen_vl,
    siglip,
    smolvlm,
    vilt,
    whisper,
)

FAMILIES: dict[str, Family] = {
    "clip": clip.FAMILY,
    "altclip": altclip.FAMILY,
    "chinese_clip": chinese_clip.FAMILY,
    "clap": clap.FAMILY,
    "siglip": siglip.FAMILY,
    "dual_encoder": dual_encoder.FAMILY,
    "flava": flava.FAMILY,
    "blip": blip.CAPTIONER,
    "blip_vqa": blip.ANSWERER,
    "blip_retrieval": blip_retrieval.FAMILY,
    "vilt": vilt.ANSWERER,
    "vilt_retrieval": vilt.RETRIEVER,
    "layoutlm": layoutlm.FAMILY,
    "whisper": whisper.FAMILY,
    "llava": llava.LLAVA,
    "llava_next": llava.LLAVA_NEXT,
    "qwen_vl": qwen_vl.FAMILY,
    "smolvlm": smolvlm.FAMILY,
    "paligemma": paligemma.FAMILY,
}


def family_for(config: dict[str, Any]) -> Family:
    """Return the family that serves a config.json. Raises UsageError listing the supported classes."""
    kind, classes = config.get("model_type", ""), config.get("architectures") or []
    for family in FAMILIES.values():
        if kind in family.model_types and (not classes or set(classes) & set(family.architectures)):
            return family
    supported = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    found = classes[0] if classes else kind or "a config without model_type"
    raise UsageError(
        f"{found} is not supported",
        hint=f"supported: {supported}. To add one, copy mmcompress/families/clip.py",
    )
