"""Says which of our locked packages have known vulnerabilities, as pip-audit finds them in the package index."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LOCKS = sorted(Path(__file__).parent.parent.joinpath("requirements").glob("*.lock"))


def audited(lock: Path) -> list[dict[str, object]]:
    """Each package of a lock: with `vulns`, or with a `skip_reason`."""
    command = [sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip", "--format", "json"]
    done = subprocess.run([*command, "--requirement", str(lock)], capture_output=True, text=True, check=False)
    if not done.stdout:
        sys.exit(f"{lock.name} could not be audited: {done.stderr.strip()}")
    packages: list[dict[str, object]] = json.loads(done.stdout)["dependencies"]
    return packages


def main() -> None:
    """Fails where there is one, or where the index knows some packages and others not."""
    packages = [package for lock in LOCKS for package in audited(lock)]
    unknown = {f"{package['name']}: {package['skip_reason']}" for package in packages if "skip_reason" in package}
    if len(packages) == sum("skip_reason" in package for package in packages):
        print("Nothing was audited: this package index knows of no vulnerabilities. Ask again where it does.")
        return
    found = {f"{one['name']} {one['version']}: {one['vulns']}" for one in packages if one.get("vulns")}
    for line in sorted(unknown | found):
        print(line, file=sys.stderr)
    if unknown or found:
        sys.exit(f"{len(found)} of {len(packages)} packages have known vulnerabilities, {len(unknown)} are unknown.")
    print(f"{len(packages)} packages of {len(LOCKS)} locks, none with a known vulnerability.")


if __name__ == "__main__":
    main()
