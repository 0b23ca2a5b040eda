"""The listing of a source, whatever its format: the images in it, and the files that are not images."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from data_prep.manifest import SplitName


@dataclass
class FoundImage:
    """One image of a source, before all classes are known and labels can be numbered."""

    path: str
    class_name: str | None
    split: SplitName | None = None
    container: str | None = None
    offset: int = 0
    bytes: int = 0

    @property
    def name_in_container(self) -> str:
        """Name of the member of a tar; the path of an image outside of one."""
        return self.path if self.container is None else self.path.removeprefix(f"{self.container}#")


@dataclass
class Listing:
    """The images and the other files found in a source so far."""

    found: list[FoundImage] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    """Files that are not images: the reason by path."""
    ignored_of_class: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Paths of the ignored files that are in the folder of a class, by class."""
    declared_classes: list[str] = field(default_factory=list)
    """Class names in the order in which the source declares them; empty if it declares none."""
    left_behind: Counter[str] = field(default_factory=Counter)
    """Number of files that an operating system or another program left in the source, by kind."""

    def ignore(self, path: str, reason: str, class_name: str | None = None) -> None:
        """Add a file that is not an image, judging by its place or name."""
        self.ignored[path] = reason
        if class_name is not None:
            self.ignored_of_class[class_name].append(path)
