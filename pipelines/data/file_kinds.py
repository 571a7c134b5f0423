"""What the name of a file says of it: a picture, labels, a document, or something else.

In: a path below a source. Out: its kind. Must not know formats, nor read a file.
"""

from __future__ import annotations

import os

from pipelines.data.sources import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES

PICTURE_SUFFIXES = IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES
"""Suffixes that mean a picture, whether it can be read or not."""
LABEL_SUFFIXES = frozenset(
    {
        *(".json", ".jsonl", ".ndjson", ".geojson", ".xml", ".txt", ".csv", ".tsv"),
        *(".yaml", ".yml", ".parquet", ".names", ".xls", ".xlsx"),
    }
)
"""Suffixes of files that may have labels."""
_ARRAY_SUFFIXES = frozenset(
    {
        *("", ".mat", ".npy", ".npz", ".pkl", ".pickle", ".h5", ".hdf5", ".lst", ".lmdb", ".mdb"),
        *(".db", ".sqlite", ".sqlite3", ".ods", ".arrow", ".feather", ".tfrecord", ".record"),
    }
)
"""Suffixes of files in formats that aren't read. Where no other file has labels they may be in
one of these; where others have, these are mostly copies, intermediate results or features."""
_COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip"})
_DOCUMENT_SUFFIXES = frozenset(
    {
        *(".md", ".rst", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".tex", ".bib", ".html", ".htm"),
        *(".py", ".ipynb", ".m", ".sh", ".bat", ".r", ".c", ".h", ".cpp", ".hpp", ".js", ".java"),
        *(".lnk", ".url", ".webloc"),
    }
)
_DOCUMENT_WORDS = (
    *("readme", "license", "licence", "copying", "copyright", "notice", "citation", "citing"),
    *("changelog", "changes", "authors", "contributing", "requirements", "attribution", "terms"),
    *("disclaimer", "credits", "version"),
)
_DOCUMENT_NAMES = frozenset(
    {
        *(".ds_store", "thumbs.db", "desktop.ini", ".directory", ".gitkeep", ".gitignore"),
        *(".gitattributes", ".nojekyll", "makefile", "dockerfile", "icon\r"),
        *("dataset-metadata.json", "dataset_infos.json", "dataset_info.json", "croissant.json"),
        *("datapackage.json", "checksums.txt", "sha256sums", "md5sums", "md5sums.txt"),
    }
)
_TOOL_FOLDERS = frozenset(
    {
        *("__macosx", ".git", ".svn", ".hg", ".dvc", ".cache", ".idea", ".vscode", "@eadir"),
        *("__pycache__", ".ipynb_checkpoints", ".thumbnails", ".trash", ".trashes", ".fseventsd"),
        *(".spotlight-v100", ".temporaryitems", ".appledouble", "lost+found"),
    }
)
"""Folders of tools and systems: nothing in them belongs to a data set."""


def could_be_labels(path: str) -> bool:
    """Whether a file may have the labels of a data set, in a format that is read or not."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in _COMPRESSED:  # labels.json.gz
        return os.path.splitext(stem)[1] in LABEL_SUFFIXES and not is_document(path)
    return suffix in LABEL_SUFFIXES | _ARRAY_SUFFIXES and not is_document(path)


def is_document(path: str) -> bool:
    """Whether a file is about a data set, or of a tool or system, and so no part of it."""
    *folders, name = path.lower().split("/")
    if any(part in _TOOL_FOLDERS or part.startswith(".trash-") for part in folders):
        return True
    stem, suffix = os.path.splitext(name)
    if name in _DOCUMENT_NAMES or name.startswith("._") or suffix in _DOCUMENT_SUFFIXES:
        return True
    first = stem.replace("-", " ").replace("_", " ").replace(".", " ").split(" ")[0]
    return first in _DOCUMENT_WORDS and suffix not in PICTURE_SUFFIXES
