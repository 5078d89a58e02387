"""Ask the advisory database for known holes in what is installed here, and in the oldest releases that pyproject.toml allows.

`python .ci/audit.py` exits with 1 for a hole, which it names. Without a network, or where a mirror of the registry has
no advisories, it says so in one line and exits with 0.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REQUIREMENT = re.compile(r'"(?P<name>[\w.-]+)>=(?P<version>[\d.]+)"')
IGNORED = {  # advisory → why it is none here
    "CVE-2026-1839": "transformers' Trainer loads a state of random numbers by torch.load, which torch ≥ 2.6 does without code",
}


def main() -> None:
    """Audit both, print one line each, and exit."""
    with tempfile.TemporaryDirectory() as folder:
        lowest = Path(folder) / "lowest.txt"
        lowest.write_text("".join(f"{name}=={version}\n" for name, version in lower_bounds().items()), encoding="utf-8")
        audits = {
            "what is installed": audit("--local", "--skip-editable"),
            "the oldest releases allowed": audit("--no-deps", "--disable-pip", "--requirement", str(lowest)),
        }
    holes = [hole for what, packages in audits.items() for hole in report(what, packages)]
    sys.exit("\n".join(holes) if holes else 0)


def lower_bounds() -> dict[str, str]:
    """The packages of pyproject.toml, with the lowest version of each."""
    lowest: dict[str, str] = {}
    for match in REQUIREMENT.finditer((ROOT / "pyproject.toml").read_text(encoding="utf-8")):
        name, version = match["name"], match["version"]
        lowest[name] = min(version, lowest.get(name, version), key=lambda each: [int(part) for part in each.split(".")])
    return lowest


def audit(*arguments: str) -> list[dict[str, Any]] | None:
    """What pip-audit says of each package; None where it cannot ask."""
    ignored = [part for advisory in IGNORED for part in ("--ignore-vuln", advisory)]
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", *ignored, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages: list[dict[str, Any]] = json.loads(ended.stdout)["dependencies"]
    except ValueError:
        return None
    return packages


def report(what: str, packages: list[dict[str, Any]] | None) -> list[str]:
    """Print how many packages were asked for; return their holes."""
    known = [package for package in packages or () if "skip_reason" not in package]
    if packages is None or not known:
        print(f"audit of {what}: skipped, since no advisories can be reached from here")
        return []
    unknown = len(packages) - len(known)
    print(f"audit of {what}: {len(known)} packages" + (f", {unknown} that the database does not know" if unknown else ""))
    return [
        f"{package['name']} {package['version']} ({what}) has {hole['id']}: take {' or '.join(hole['fix_versions']) or 'another package'}."
        for package in known
        for hole in package["vulns"]
    ]


if __name__ == "__main__":
    main()
