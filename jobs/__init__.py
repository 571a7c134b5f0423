"""The verbs of the command, a module each. Importing the package makes sure that a user's folder
`models/` or `pipelines/` isn't imported instead of Tessera's own."""

import tessera

try:
    tessera.use_own_packages()
except ImportError as error:
    raise SystemExit(f"tessera: {error}") from None
