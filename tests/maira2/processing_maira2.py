"""Stands for the file of this name in microsoft/maira-2: the same calls and arguments.

The prompts are our own; an argument that the released processor does not know is refused here."""

import re

import numpy as np
from PIL import Image
from transformers import LlavaProcessor


class Maira2Processor(LlavaProcessor):
    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        phrase_start_token="<obj>",
        phrase_end_token="</obj>",
        box_start_token="<box>",
        box_end_token="</box>",
        num_box_coord_bins=100,
        num_additional_image_tokens=1,  # the tower's first token, as transformers 5 counts it
        **kwargs,
    ):
        super().__init__(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.phrase_start_token, self.phrase_end_token = phrase_start_token, phrase_end_token
        self.box_start_token, self.box_end_token = box_start_token, box_end_token
        self.num_box_coord_bins = num_box_coord_bins
        self.calls = []  # for the tests: what was asked

    @staticmethod
    def stretched(image):
        "Grey, its darkest pixel 0 and its brightest 255."
        grey = np.array(image.convert("L")).astype(float)
        grey -= grey.min()
        return Image.fromarray((grey / max(grey.max(), 1) * 255).astype(np.uint8))

    def format_and_preprocess_reporting_input(
        self,
        current_frontal,
        current_lateral,
        prior_frontal,
        indication,
        technique,
        comparison,
        prior_report,
        get_grounding=False,
        assistant_text=None,
        **kwargs,
    ):
        "Inputs of the model for a report: frontal, lateral and prior view in this order; sections or N/A."
        if unknown := set(kwargs) - {"return_tensors", "padding"}:
            raise TypeError(f"not passed on by the processor: {', '.join(sorted(unknown))}")
        views = dict(frontal=current_frontal, lateral=current_lateral, prior=prior_frontal)
        views = {name: self.stretched(image) for name, image in views.items() if image is not None}
        sections = dict(indication=indication, technique=technique, comparison=comparison)
        if prior_frontal is not None:
            sections["prior_report"] = prior_report
        told = " ".join(f"{name.upper()}: {text or 'N/A'}" for name, text in sections.items())
        task = "grounded findings." if get_grounding else "findings."
        content = [part for name in views for part in (_text(f"{name} "), {"type": "image", "text": None})]
        turns = [{"role": "user", "content": [*content, _text(f" {task} {told}")]}]
        if assistant_text is not None:
            turns.append({"role": "assistant", "content": [_text(assistant_text)]})
        text = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=assistant_text is None, tokenize=False
        )
        self.calls.append(dict(text=text, images=list(views.values())))
        return self(text=text, images=list(views.values()), **kwargs)

    def convert_output_to_plaintext_or_grounded_sequence(self, text):
        "`text` as it is; of grounded phrases a list of (phrase, boxes or None)."
        text = text.strip()
        marks = (self.phrase_start_token, self.phrase_end_token, self.box_start_token, self.box_end_token)
        if not any(mark in text for mark in marks):
            return text
        start, end = map(re.escape, marks[:2])
        assert re.fullmatch(f"({start}.*?{end})+", text), "phrases that do not begin or end"
        return [self._phrase(inner) for inner in re.findall(f"{start}(.*?){end}", text)]

    def _phrase(self, text):
        phrase, mark, boxes = text.partition(self.box_start_token)
        found = re.findall(r"<x(\d+)><y(\d+)><x(\d+)><y(\d+)>", boxes)
        scaled = [tuple((int(edge) + 0.5) / self.num_box_coord_bins for edge in box) for box in found]
        return phrase.strip(), scaled if mark else None


def _text(text):
    return {"type": "text", "text": text}
