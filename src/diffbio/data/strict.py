"""YAML and JSON of which nothing is silently lost or multiplied."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..errors import DiffBioError


def strict_yaml(text: str, where: object, *, error: type[DiffBioError], name: str = "name") -> Any:
    """Return what a YAML text says; names given twice and values that refer to others are refused.

    Parameters
    ----------
    text
        The YAML.
    where
        File that it comes from, for messages.
    error
        What to raise.
    name
        What the names of the mapping are called in messages.

    Raises
    ------
    DiffBioError, of the class `error` : no valid YAML, a name twice, or a reference.
    """
    import yaml

    class Strict(yaml.SafeLoader):
        """Refuses repeated names, of which YAML would silently keep the last, and values that refer to others."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for terabytes
                msg = f"{where}: *{self.peek_event().anchor} refers to another value; write the value out"
                raise error(msg)
            return super().compose_node(parent, index)

    def mapping(loader: Any, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's
        names = [loader.construct_object(key, deep=True) for key, _ in node.value]
        if again := sorted({str(key) for key in names if names.count(key) > 1}):
            msg = f"{where}: {name} {again[0]!r} is given twice; keep one"
            raise error(msg)
        return yaml.SafeLoader.construct_mapping(loader, node, deep)

    # YAML 1.1, which PyYAML reads, takes 1e-3 for text
    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Strict.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader=Strict)  # a SafeLoader
    except (yaml.YAMLError, RecursionError) as failure:
        msg = f"{where} is not valid YAML: {' '.join(str(failure).split())[:300]}"
        raise error(msg) from failure


def strict_json(text: str, where: object, *, error: type[DiffBioError], name: str = "name") -> Any:
    """Return what a JSON text says; names given twice are refused. Arguments as of `strict_yaml`.

    Raises
    ------
    DiffBioError, of the class `error` : no valid JSON, or a name twice.
    """

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                msg = f"{where}: {name} {key!r} is given twice; keep one"
                raise error(msg)
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=mapping)
    except (json.JSONDecodeError, RecursionError) as failure:
        msg = f"{where} is not valid JSON: {' '.join(str(failure).split())[:300]}"
        raise error(msg) from failure
