"""Settings by which files are read, passed on as one value."""

from dataclasses import dataclass
from pathlib import Path

from hf_dissect.data.pair_columns import CAPTION_COLUMNS, CLEAN_COLUMNS, IMAGE_COLUMNS, OPEN_CLIP_COLUMNS
from hf_dissect.data.tables.delimited import read_separator
from hf_dissect.data.tables.text_file import check_encoding

DEFAULT_TEMPLATE = "a photo of a {}"
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "cls", "category", "task", "domain", "id", "key", "uid")


@dataclass(frozen=True)
class ReadingOptions:
    """Settings of the data section that say how files become rows.

    Attributes:
        separator: Character between the fields of delimited text; None takes it from the header.
        encoding: Encoding of text files without a byte order mark; None for UTF-8.
        image_root: Folder to which the paths of pictures are relative; None for the folder of the table.
        class_template: Caption of a picture in a class folder, with {} or {class} for the class.
        image_column: Column with the images or their paths; None recognises the usual names.
        caption_column: Column with the captions; None recognises the usual names.
        id_column: Column with the ids; None if there is none.
        task_column: Column with the tasks; None if there is none.
        clean_column: Column with the truth; None recognises the usual names.
        weight_column: Column with the weights; None if there is none.
        balance_column: Column with the clusters to balance; None if there is none.
    """

    separator: str | None = None
    encoding: str | None = None
    image_root: str | None = None
    class_template: str = DEFAULT_TEMPLATE
    image_column: str | None = None
    caption_column: str | None = None
    id_column: str | None = None
    task_column: str | None = None
    clean_column: str | None = None
    weight_column: str | None = None
    balance_column: str | None = None

    @property
    def text_columns(self) -> set[str]:
        """Names of the columns that hold text, whatever it looks like."""
        return {*_given(self.image_column, self.caption_column), *IMAGE_COLUMNS, *CAPTION_COLUMNS, *OPEN_CLIP_COLUMNS}

    @property
    def name_columns(self) -> set[str]:
        """Names of the columns that hold text or integers, but neither other numbers nor true and false."""
        return {*_given(self.id_column, self.task_column, self.balance_column), *_LABEL_COLUMNS}

    @property
    def unique_columns(self) -> set[str]:
        """Names of the columns that a table may have only once."""
        named = _given(self.id_column, self.task_column, self.clean_column, self.weight_column, self.balance_column)
        return {*self.text_columns, *named, *CLEAN_COLUMNS}

    def picture_root(self, folder: Path) -> Path:
        """Return the folder to which the paths of pictures in tables of `folder` are relative.

        Raises:
            FileNotFoundError: If there is no folder `image_root`.
        """
        if self.image_root is None:
            return folder
        root = Path(self.image_root).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(
                f"data.image_root {self.image_root!r} is not a folder. Name the folder to which the paths of the "
                "pictures are relative, or leave it out if they are relative to the table."
            )
        return root


def check_reading_options(options: ReadingOptions, source: str, streaming: bool) -> None:
    """Check how files are read, and that the source reads such files.

    Raises:
        ValueError: If a value is not allowed or would have no effect.
    """
    if options.separator is not None:
        read_separator(options.separator)
    if options.encoding is not None:
        check_encoding(options.encoding)
    if "{}" not in options.class_template and "{class}" not in options.class_template:
        raise ValueError(
            f"data.class_template is {options.class_template!r}, but must hold {{}} or {{class}} for the name of the "
            f"class, such as {DEFAULT_TEMPLATE!r}."
        )
    local = ("folder", "imagefolder")
    for argument, sources in (("separator", local), ("encoding", local), ("image_root", (*local, "hub"))):
        value = getattr(options, argument)
        if value is not None and source not in sources:
            raise ValueError(
                f"data.{argument} is {value!r}, but data.source {source!r} does not read it. Set data.source to "
                f"{' or '.join(sources)}, or leave data.{argument} out."
            )
    if options.image_root is not None and source == "hub" and streaming:
        raise ValueError(
            f"data.image_root is {options.image_root!r} with data.streaming: it needs the rows at hand. Set "
            "data.streaming to false, or leave data.image_root out."
        )


def _given(*names: str | None) -> list[str]:
    return [name for name in names if name is not None]
