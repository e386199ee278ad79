"""Import endlex before pytest calls its tests `endlex.tests`, which would hide the package."""

import endlex  # noqa: F401
