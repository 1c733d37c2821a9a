"""Hides which language a file is written in, and what its grammar calls a definition."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tree_sitter import Language

_SUFFIXES: Final = {
    suffix: language
    for language, suffixes in {
        "bash": "sh bash zsh ksh bats",
        "c": "c h",
        "c#": "cs csx",
        "c++": "cc cpp cxx c++ hh hpp hxx h++ inl ipp cu cuh",
        "clojure": "clj cljs cljc edn",
        "css": "css scss sass less",
        "cython": "pyx pxd pxi",
        "dart": "dart",
        "elixir": "ex exs",
        "erlang": "erl hrl",
        "f#": "fs fsi fsx",
        "fortran": "f f90 f95 for",
        "go": "go",
        "graphql": "graphql gql",
        "groovy": "groovy gradle",
        "haskell": "hs",
        "html": "html htm xhtml vue svelte jinja j2",
        "ini": "ini cfg conf properties env editorconfig",
        "java": "java",
        "javascript": "js mjs cjs jsx",
        "json": "json jsonc json5 ipynb",
        "julia": "jl",
        "kotlin": "kt kts",
        "lua": "lua",
        "markdown": "md markdown mdx",
        "nix": "nix",
        "objective-c": "m mm",
        "ocaml": "ml mli",
        "perl": "pl pm",
        "php": "php phtml",
        "powershell": "ps1 psm1",
        "proto": "proto",
        "python": "py pyi pyw",
        "r": "r",
        "restructuredtext": "rst",
        "ruby": "rb rake gemspec",
        "rust": "rs",
        "scala": "scala sbt",
        "sql": "sql",
        "swift": "swift",
        "tcl": "tcl",
        "terraform": "tf tfvars hcl",
        "text": "txt text log",
        "toml": "toml",
        "tsx": "tsx",
        "typescript": "ts mts cts",
        "xml": "xml xsd xsl xslt wsdl",
        "yaml": "yaml yml",
        "zig": "zig",
    }.items()
    for suffix in suffixes.split()
}
_NAMES: Final = {
    "cmakelists.txt": "cmake", "dockerfile": "dockerfile", "containerfile": "dockerfile", "gemfile": "ruby",
    "jenkinsfile": "groovy", "makefile": "make", "gnumakefile": "make", "rakefile": "ruby", "vagrantfile": "ruby",
    "license": "text", "readme": "text", ".bashrc": "bash", ".zshrc": "bash", ".profile": "bash",
}  # fmt: skip
_INTERPRETERS: Final = {
    "python": "python", "pypy": "python", "sh": "bash", "bash": "bash", "dash": "bash", "zsh": "bash", "ksh": "bash",
    "node": "javascript", "nodejs": "javascript", "deno": "typescript", "ruby": "ruby", "php": "php", "perl": "perl",
    "lua": "lua", "rscript": "r",
}  # fmt: skip
LANGUAGES: Final = sorted({*_SUFFIXES.values(), *_NAMES.values(), *_INTERPRETERS.values()})
"""All that are known."""

_SHEBANG = re.compile(r"#!\s*(?:\S*/env\s+(?:-\S+\s+|\w+=\S+\s+)*)?(?:\S*/)?([A-Za-z]+)")
_CPP = re.compile(r"^[^\S\n]*(?:class|namespace|template|using|public:|private:|protected:)(?!\w)", re.MULTILINE)


def language_of(path: str, text: str) -> str:
    """Its name as people write it, in lower case, by the file's name and first line; "" if nothing tells."""
    name = path.rpartition("/")[2].lower()
    language = _NAMES.get(name) or _SUFFIXES.get(name.rpartition(".")[2] if "." in name else "", "")
    if language == "c" and name.endswith(".h") and _CPP.search(text):
        return "c++"
    shebang = None if language else _SHEBANG.match(text)
    return _INTERPRETERS.get(shebang[1].lower(), "") if shebang else language


# ── grammars ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Grammar:
    """What reads a language, and the nodes of its trees that define something, by type, with how they are named.

    `name` is the field that holds the name; with `name=value` only where there is that other field, too, and where it
    is a `value` or `right`, only a function or a class; with `owner.name` the first field says whose it is.
    """

    language: "Language"
    definitions: Mapping[str, str]


_JAVASCRIPT: Final = {
    **dict.fromkeys(
        ("function_declaration", "generator_function_declaration", "class_declaration", "method_definition"), "name"
    ),
    "variable_declarator": "name=value", "assignment_expression": "left=right", "pair": "key=value",
}  # fmt: skip
_TYPESCRIPT: Final = {
    **_JAVASCRIPT,
    **dict.fromkeys(
        ("interface_declaration", "type_alias_declaration", "enum_declaration", "abstract_class_declaration",
         "internal_module", "module", "function_signature", "abstract_method_signature"), "name"
    ),
    "public_field_definition": "name=value",
}  # fmt: skip
_C: Final = {
    "function_definition": "declarator", "type_definition": "declarator", "preproc_function_def": "name",
    **dict.fromkeys(("struct_specifier", "enum_specifier", "union_specifier"), "name=body"),
}  # fmt: skip
_NAMED: Final = {
    "bash": "function_definition",
    "c#": "namespace_declaration class_declaration interface_declaration struct_declaration record_declaration"
    " enum_declaration delegate_declaration method_declaration constructor_declaration destructor_declaration"
    " property_declaration local_function_statement",
    "go": "function_declaration type_spec",
    "java": "class_declaration interface_declaration enum_declaration record_declaration"
    " annotation_type_declaration method_declaration constructor_declaration compact_constructor_declaration",
    "php": "class_declaration interface_declaration trait_declaration enum_declaration"
    " function_definition method_declaration",
    "python": "function_definition class_definition",
    "ruby": "module class method singleton_method",
    "rust": "function_item function_signature_item struct_item enum_item union_item trait_item macro_definition",
}
_DEFINITIONS: Final[Mapping[str, Mapping[str, str]]] = {
    **{language: dict.fromkeys(types.split(), "name") for language, types in _NAMED.items()},
    "c": _C,
    "c++": {**_C, "class_specifier": "name=body", "namespace_definition": "name", "concept_definition": "name"},
    "go": {**dict.fromkeys(_NAMED["go"].split(), "name"), "method_declaration": "receiver.name"},
    "javascript": {**_JAVASCRIPT, "field_definition": "property=value"},
    "php": {**dict.fromkeys(_NAMED["php"].split(), "name"), "namespace_definition": "name=body"},
    "rust": {**dict.fromkeys(_NAMED["rust"].split(), "name"), "impl_item": "type", "mod_item": "name=body"},
    "tsx": _TYPESCRIPT,
    "typescript": _TYPESCRIPT,
}
_MODULES: Final = {"c#": "c_sharp", "c++": "cpp", "tsx": "typescript"}
_SPOKEN: Final = {"tsx": "language_tsx", "typescript": "language_typescript", "php": "language_php"}


@cache
def grammar(language: str) -> Grammar | None:
    """That of the language, loaded once; None if there is none, or its package is not installed."""
    if language not in _DEFINITIONS:
        return None
    try:
        from tree_sitter import Language

        module = import_module(f"tree_sitter_{_MODULES.get(language, language)}")
        return Grammar(Language(getattr(module, _SPOKEN.get(language, "language"))()), _DEFINITIONS[language])
    except (ImportError, AttributeError, ValueError):  # not there, or of another time than tree_sitter
        return None
