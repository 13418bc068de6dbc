"""What settings of the section lora contradict one another, or the model's. Knows no peft and no model."""

from __future__ import annotations

from dataclasses import replace

from ftlaunch.strategies.options import LoraOptions, ModelOptions

_ALL = "all-linear"


def lora_mistakes(lora: LoraOptions, model: ModelOptions) -> list[str]:
    """One line for each contradiction."""
    if lora.r is None:
        if lora == LoraOptions():
            return []
        without_r = replace(lora, r=LoraOptions().r)
        named = [
            f"lora.{name}"
            for name in LoraOptions.__slots__
            if getattr(without_r, name) != getattr(LoraOptions(), name)
        ]
        return [
            f"{named[0]} is set, but lora.r is not: without it there is no adapter. Set lora.r, for "
            "example lora.r=16."
        ]
    lines = []
    if not lora.target_modules:
        lines.append(
            "lora.target_modules is empty: nothing would be adapted. Name modules, or write all-linear."
        )
    elif _ALL in lora.target_modules and len(lora.target_modules) > 1:
        lines.append(
            f"lora.target_modules is {list(lora.target_modules)}: all-linear stands alone. Leave out "
            "the others, or it."
        )
    if model.random_weights:
        lines.append(
            "model.random_weights is true, but lora.r is set: an adapter means nothing without the "
            "weights that it was trained on, and random ones are in no file. Name a model with weights."
        )
    if model.freeze:
        lines.append(
            "model.freeze is set, but lora.r is, too: with an adapter the whole model is frozen but its "
            "head and lora.modules_to_save. Leave model.freeze out."
        )
    return lines
