"""Print which share of each folder of not_hf the last run of `make coverage` executed."""

from collections import defaultdict
from pathlib import Path

from coverage import Coverage


def main() -> None:
    """Add up the statements of every measured file, folder by folder."""
    root = Path(__file__).resolve().parents[1]
    coverage = Coverage()
    coverage.load()
    found: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for file in coverage.get_data().measured_files():
        _, statements, _, missing, _ = coverage.analysis2(file)
        for name in (str(Path(file).parent.relative_to(root)), "all"):
            found[name][0] += len(statements)
            found[name][1] += len(missing)
    print(f"{'folder':<24}{'statements':>12}{'missed':>8}{'covered':>9}")
    for name in sorted(found, key=lambda each: (each == "all", each)):
        total, missed = found[name]
        print(f"{name:<24}{total:>12}{missed:>8}{1 - missed / total:>9.1%}")


if __name__ == "__main__":
    main()
