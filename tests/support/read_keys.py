"""Records which keys of run files the code reads."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config


@contextmanager
def noted_keys() -> Iterator[set[str]]:
    """Collect the keys read inside the `with` block, except by loading, copying or comparing whole configurations."""
    read: set[str] = set()
    loading = [False]
    with pytest.MonkeyPatch.context() as patch:
        for section in dataclasses.fields(Config):
            names = {field.name for field in dataclasses.fields(section.default_factory)}

            def get(self, name, section=section.name, names=names):
                frame = sys._getframe(1)
                # asdict, replace and the methods that dataclasses generate
                copies = frame.f_globals.get("__name__") == "dataclasses" or frame.f_code.co_filename == "<string>"
                if name in names and not copies and not loading[0]:
                    read.add(f"{section}.{name}")
                return object.__getattribute__(self, name)

            patch.setattr(section.default_factory, "__getattribute__", get, raising=False)
        load = configuration.load

        def load_unnoted(*arguments):
            loading[0] = True
            try:
                return load(*arguments)
            finally:
                loading[0] = False

        patch.setattr(configuration, "load", load_unnoted)
        yield read
