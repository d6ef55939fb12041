"""A stand-in for Hugging Face's package `datasets`, for where it is not installed."""

from __future__ import annotations

import types


class Feature:
    """A feature of the stand-in, which would decode unless it is told not to."""

    def __init__(self, decode=True):
        self.decode = decode


class Audio(Feature):
    pass


class Picture(Feature):
    pass


Picture.__name__ = "Image"


class Rows:
    """What the reader uses of a `datasets.Dataset`; fails when a medium would be decoded."""

    def __init__(self, rows, features):
        self._rows, self.features = rows, features
        self.column_names = list(features)

    def cast_column(self, name, feature):
        return Rows(self._rows, {**self.features, name: feature})

    def select_columns(self, names):
        return Rows(self._rows, {name: self.features[name] for name in names})

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        for name, feature in self.features.items():
            assert not getattr(feature, "decode", False), f"{name} is decoded"
        return {name: self._rows[index][name] for name in self.features}


def package(whole: Rows) -> types.ModuleType:
    """The package, of which the reader's calls are kept in `asked`; every set is `whole`."""
    module = types.ModuleType("datasets")
    module.Image, module.Audio, module.asked = Picture, Audio, []
    module.exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))

    def load_dataset(name, config, cache_dir):
        module.asked.append((name, config, cache_dir))
        if name == "no/such":
            raise FileNotFoundError("no/such\nis not on the hub")
        if name == "a/broken":
            raise module.exceptions.DatasetsError("failed") from ValueError("row 7")
        return {"train": whole, "validation": whole}

    def load_from_disk(path):
        module.asked.append(path)
        return whole

    def load_dataset_builder(path, config):
        return types.SimpleNamespace(config=types.SimpleNamespace(data_files=module.named))

    module.named, module.load_dataset_builder = None, load_dataset_builder
    module.load_dataset, module.load_from_disk = load_dataset, load_from_disk
    return module
