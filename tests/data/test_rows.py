"""Metadata records: what counts as one more text, and what tells one dataset from another."""

from __future__ import annotations

from dataclasses import replace

from mmcompress.data import Dataset, Memory, Sample
from mmcompress.data.rows import parse_row


def test_people_who_give_the_same_answer_all_count_and_a_caption_told_twice_does_not() -> None:
    assert parse_row({"answers": ["red", "red", "blue"]}, "here", strict=True).texts == ("red", "red", "blue")
    assert parse_row({"texts": ["red", "red", "blue"]}, "here", strict=True).texts == ("red", "blue")
    assert parse_row({"text": "red", "captions": ["red", "blue"]}, "here", strict=True).texts == ("red", "blue")


def test_another_question_about_the_same_picture_is_other_data() -> None:
    sample = Sample("a", ("red",), question="What colour?")
    others = (
        replace(sample, question="Which colour?"),
        replace(sample, turns=(("Is it?", "yes"),)),
        Sample("a", ("red",)),
    )
    prints = {Dataset(Memory([one])).fingerprint() for one in (sample, *others)}
    assert len(prints) == 4
