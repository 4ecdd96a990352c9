"""What a file that is no checkpoint looks like, so that the error can say it and name the remedy."""

from __future__ import annotations

from pathlib import Path

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89HDF\r\n", "an HDF5 file (Keras?); convert it to safetensors first"),
    (0, b"GGUF", "a GGUF file (llama.cpp); load the original checkpoint it was made from"),
    (0, b"\x93NUMPY", "a NumPy array; wrap it as {name: torch.from_numpy(array)} and torch.save it"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"BZh", "a bzip2 archive; unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive; unpack it first"),
    (0, b"7z\xbc\xaf", "a 7-Zip archive; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (0, b"Rar!", "a RAR archive; unpack it first"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x7fELF", "a program (ELF)"),
    (0, b"SQLite format 3", "an SQLite database"),
    (257, b"ustar", "a tar archive (torch.save before version 0.1.10, or one made by hand); unpack it, or load and "
                    "save it again with the torch version that wrote it"),
)  # fmt: skip


def looks_like(head: bytes) -> str | None:
    """Say what a file is by its first bytes, if it is surely not a checkpoint.

    Args:
        head: at least the first 512 bytes, or all of a shorter file.

    Example:
        >>> looks_like(b"")
        'empty (0 bytes); the writing was interrupted, or the download failed: copy it again'
    """
    if not head:
        return "empty (0 bytes); the writing was interrupted, or the download failed: copy it again"
    for offset, magic, words in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return words
    if not head.strip(b"\0"):
        return "filled with zeros; the disk or the download was interrupted: copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself; run `git lfs pull` where it came from"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the file itself; the download was answered by a login or error page"
    if _is_text(head):
        return f"a text file (it begins with {head[:40].decode('utf-8', 'replace')!r})"
    return None


def _is_text(head: bytes) -> bool:
    if head.startswith((b"(", b"]", b"}", b"I", b"c")) and head.rstrip().endswith(b"."):
        return False  # could be a pickle of protocol 0, which is text
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # not only a character cut at the end
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)


def read_head(path: Path, size: int = 4096) -> bytes:
    """Read the first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(size)
