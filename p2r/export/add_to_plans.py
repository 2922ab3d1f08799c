"""Add the configuration of a pretrained network to nnU-Net's plans of a data set. Needs only Python.

    python add_to_plans.py nnUNetPlans.json

Beside this file there is `configuration.json`. The patch of the inherited configuration is rounded up to sides that the network
can halve, and at least two of its smallest images. Running it again changes nothing.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def add_configuration(plans: dict[str, Any], configuration: dict[str, Any]) -> str:
    """Add the configuration to the plans, and return its name.

    Raises:
        KeyError: The plans lack the configuration from which it inherits.
    """
    divisor = configuration["_size_divisor"]
    (name,) = (key for key in configuration if not key.startswith("_"))
    values = dict(configuration[name])
    base = plans["configurations"][values["inherits_from"]]
    values["patch_size"] = [max(2 * divisor, -(-side // divisor) * divisor) for side in base["patch_size"]]
    plans["configurations"][name] = values
    return name


def main() -> int:
    """Read both files, and write the plans in one step."""
    if len(sys.argv) != 2:
        print("usage: python add_to_plans.py nnUNetPlans.json", file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    plans = json.loads(path.read_text(encoding="utf-8"))
    configuration = json.loads(Path(__file__).with_name("configuration.json").read_text(encoding="utf-8"))
    try:
        name = add_configuration(plans, configuration)
    except KeyError as error:
        print(f"{path} has no configuration {error.args[0]}: run nnUNetv2_plan_and_preprocess first", file=sys.stderr)
        return 2
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(plans, indent=4), encoding="utf-8")
    os.replace(temporary, path)  # noqa: PTH105 (one step)
    print(f"{path}: configuration {name}, patch {plans['configurations'][name]['patch_size']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
