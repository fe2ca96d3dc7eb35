"""The keywords of a call are the fields of SamplingParams, and the forms of a text."""

from __future__ import annotations

import dataclasses
import typing

from isthmus.forms import FormatOptions
from isthmus.types import SamplingOptions, SamplingParams


def test_keywords_and_fields_are_the_same() -> None:
    """An option added to one of them would be refused as a keyword, or not be known to a type checker."""
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    keywords, options = typing.get_type_hints(SamplingOptions), typing.get_type_hints(SamplingParams)
    forms = typing.get_type_hints(FormatOptions)
    del options["response_format"]  # which the keywords for forms spell
    assert keywords == {**options, **forms}
    assert all(field.kw_only for field in dataclasses.fields(SamplingParams)), "a new one must not move the others"
    assert fields == options.keys() | {"response_format"}
