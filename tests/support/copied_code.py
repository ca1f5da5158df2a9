"""A prompt that the demo target goes on with by copying: what follows can be guessed from what repeats."""

from __future__ import annotations

FUNCTION = """def load_settings(path, default=None):
    if not os.path.exists(path):
        return default
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    for name, value in settings.items():
        if value is None:
            settings[name] = default
    return settings


"""
COPIED_CODE = "import json\nimport os\n\n\n" + 3 * FUNCTION + "def load_settings(path"
