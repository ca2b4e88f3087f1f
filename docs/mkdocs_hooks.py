"""Links from the pages to source files, which the repository shows and the built site does not have."""

import logging
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.plugins.source_links")  # a warning in this tree fails a strict build

# A block of code or code in a line, which is left as it is; or a link.
CODE_OR_LINK = re.compile(r"```.*?```|`[^`\n]*`|\[([^\]]+)\]\(([\w./-]+)(?:#[^)\s]*)?\)", re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page with links to source files replaced by their text; warns of files that do not exist."""
    docs = Path(config.docs_dir).resolve()
    folder = (docs / page.file.src_uri).parent

    def unlinked(match: re.Match[str]) -> str:
        text, target = match.groups()
        if target is None:
            return match[0]
        path = (folder / target).resolve()
        if path.is_relative_to(docs) and path.suffix != ".py":
            return match[0]  # a page or a picture: MkDocs checks these
        if not path.exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, target)
        return text

    return CODE_OR_LINK.sub(unlinked, markdown)
