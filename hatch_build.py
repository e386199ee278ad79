"""Build hook: put the chat page's libraries from the npm registry into the package.

They render Markdown (marked, MIT), sanitise it (DOMPurify, Apache-2.0 or MPL-2.0), highlight code
(highlight.js, BSD-3-Clause) and set formulas (KaTeX, MIT). Endlex's hook does the same for its
charts and says how: pinned versions, checked hashes, a warning where nothing can be fetched.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parent / "endlex" / "server" / "hatch_build.py"
_SPEC = importlib.util.spec_from_file_location("endlex_hatch_build", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
endlex = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(endlex)


class CustomBuildHook(endlex.CustomBuildHook):  # type: ignore[name-defined, misc]
    """What hatchling calls; its name is hatchling's choice."""

    FOLDER = "src/archerchat/serving/page/vendor"
    PACKAGES = (
        endlex.Package(
            "marked@18.2.1",
            "ii4bxCTCqqwpT86XZWgJNs+ZnAIZksmLGYMViWA7PDIXYIeNo1x6cDdX3JOip9NM/cI6p8z57FxliACboTruMA==",
            {"package/lib/marked.esm.js": "marked.js", "package/LICENSE": "marked.LICENSE"},
        ),
        endlex.Package(
            "dompurify@3.5.0",
            "LYC0ZkE8P1V42JsRYTwMdme/2ET8SpOc5AA2eOFjP/IadvRd2fwiT4TVz5vkfy0XUx12aS2UaRkTnfVPNOv9vw==",
            {"package/dist/purify.min.js": "purify.js", "package/LICENSE": "purify.LICENSE"},
        ),
        endlex.Package(
            "@highlightjs/cdn-assets@11.12.0",
            "KvOKXODaiFmId9xaq3xc5xCL66wVLUuOngDbO9B/kewbFTqdGbn2nJxNhN3H5R1cgDTVj6R8vH0zgiNDEGjpDw==",
            {
                "package/es/highlight.min.js": "highlight.js",
                "package/LICENSE": "highlight.LICENSE",
            },
        ),
        endlex.Package(
            "katex@0.19.1",
            "jG8uKntjSEcm2EpQOh0XturpPuuC9r3Sq5HLHdsFdWZT27E672SF19QEi+of0/YeOy15lDgRhKvr5614uRrEfA==",
            {"package/dist/katex.min.js": "katex.js", "package/LICENSE": "katex.LICENSE"},
        ),
    )
    WITHOUT = "archerchat: the chat page will show answers with less care"
    WEB = None
