"""The account of a source: everything that was found, and what became of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.values import JsonObject

REPORT_KEY = "report.json"
"""The account of a data set, beside its manifest."""
EXAMPLES = 5
"""Names that are kept of each reason."""


@dataclass
class Account:
    """What a source found: ``found`` is ``used`` and all that was passed over, always."""

    unit: str = "images"
    """What is counted: files, members of tars, samples, rows."""
    used: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)
    """How many, by the reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first names of each reason."""
    origins: dict[str, str] = field(default_factory=dict)
    """By split, what decided that an image belongs to it."""
    unlabelled: int = 0
    """Used images without a label."""
    odd_labels: int = 0
    """Labels that are neither whole numbers nor names."""
    notes: list[str] = field(default_factory=list)
    """What else a user should know, in sentences without a full stop."""

    @property
    def found(self) -> int:
        return self.used + sum(self.passed_over.values())

    def pass_over(self, reason: str, name: str) -> None:
        """Count something that is not used."""
        self.passed_over[reason] = self.passed_over.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(name)

    def add(self, other: "Account") -> None:
        """Count what another account has counted, too."""
        self.used += other.used
        self.unlabelled += other.unlabelled
        self.odd_labels += other.odd_labels
        for reason, count in other.passed_over.items():
            self.passed_over[reason] = self.passed_over.get(reason, 0) + count
            known = self.examples.setdefault(reason, [])
            known += other.examples.get(reason, [])[: EXAMPLES - len(known)]

    def pass_over_label(self) -> None:
        """Count a label that is neither a whole number nor a name; its image is used without."""
        self.odd_labels += 1

    def unusable(self, names: list[str]) -> None:
        """Note that used images turned out to be unreadable."""
        self.used -= len(names)
        for name in names:
            self.pass_over("unreadable", name)

    def to_json(self, class_names: list[str] | None, num_classes: int | None) -> JsonObject:
        """As ``report.json`` holds it."""
        return {
            "unit": self.unit,
            "found": self.found,
            "used": self.used,
            "passed_over": {
                reason: {"count": count, "examples": self.examples.get(reason, [])}
                for reason, count in sorted(self.passed_over.items())
            },
            "labels": {
                "classes": num_classes or 0,
                "names": class_names,
                "labelled": self.used - self.unlabelled if num_classes else 0,
                "unlabelled": self.unlabelled if num_classes else self.used,
                "odd": self.odd_labels,
            },
            "splits_from": self.origins,
            "notes": self.notes,
        }

    @classmethod
    def from_json(cls, value: JsonObject) -> "Account":
        """The counts of an account that ``counts`` wrote."""
        return cls(**value)

    def counts(self) -> JsonObject:
        """The counts as JSON, to be added up elsewhere."""
        return {
            "used": self.used,
            "passed_over": self.passed_over,
            "examples": self.examples,
            "unlabelled": self.unlabelled,
            "odd_labels": self.odd_labels,
        }


def format_account(report: Mapping[str, JsonObject]) -> list[str]:
    """The account in ``report.json``, as a few lines of text."""
    labels, passed = report["labels"], report["passed_over"]
    total = sum(each["count"] for each in passed.values())
    lines = [
        f"{report['found']:,} {report['unit']} found: {report['used']:,} used,"
        f" {total:,} passed over"
    ]
    lines += [
        f"  {each['count']:,} {reason}: {', '.join(each['examples'][:2])}"
        for reason, each in sorted(passed.items(), key=lambda item: -item[1]["count"])[:8]
    ]
    if labels["classes"]:
        names = labels["names"] or []
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        classes = f"{labels['classes']:,} class{'es' if labels['classes'] > 1 else ''}"
        line = f"labels: {classes}" + (f" ({shown})" if names else "")
        lines.append(line + (f"; {labels['unlabelled']:,} without" if labels["unlabelled"] else ""))
    else:
        lines.append("labels: none")
    if labels["odd"]:
        lines.append(f"{labels['odd']:,} labels are neither whole numbers nor names, and left out")
    origins = report["splits_from"]
    if len(set(origins.values())) == 1:
        lines.append(f"splits: by {next(iter(origins.values()))}")
    elif origins:
        lines.append("splits: " + "; ".join(f"{split} by {how}" for split, how in origins.items()))
    return [*lines, *report["notes"]]
