"""What the way through a source comes to, whatever the format: images, and files that are none."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from data_prep.manifest import SplitName


@dataclass
class FoundImage:
    """One image while the classes are not known yet."""

    path: str
    class_name: str | None
    split: SplitName | None = None
    container: str | None = None
    offset: int = 0
    bytes: int = 0


@dataclass
class Listing:
    """What the way through a source has come to."""

    found: list[FoundImage] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    """The reason of each path."""
    ignored_of_class: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Of these, the paths by class, where they have one."""
    declared_classes: list[str] = field(default_factory=list)
    """Names of classes in the order that the source gives them; empty where it gives none."""
    left_behind: Counter[str] = field(default_factory=Counter)
    """Files that a system has left in the source, by kind."""

    def ignore(self, path: str, reason: str, class_name: str | None = None) -> None:
        """Note a file that is no image by its place or name."""
        self.ignored[path] = reason
        if class_name is not None:
            self.ignored_of_class[class_name].append(path)
