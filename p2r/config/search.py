"""Section `finetune.search`: candidates for the settings of each mode."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from p2r.config.section import NumLabelled, Range, Section
from p2r.modes import MODES, Mode, Setting


class Distribution(Section):
    """Distribution of candidates, named as in Ray Tune; exactly one of the fields."""

    uniform: Range | None = None
    """Uniform between two bounds."""
    loguniform: Range | None = None
    """Log-uniform between two bounds above 0."""
    randint: tuple[int, int] | None = None
    """Integers from the first bound to below the second."""
    choice: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    """One of these values."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("a distribution has one of uniform, loguniform, randint and choice")
        name, bounds = self.named()
        if name != "choice" and not bounds[0] < bounds[1]:
            raise ValueError(f"{name} needs two increasing bounds, got {list(bounds)}")
        if name == "loguniform" and bounds[0] <= 0:
            raise ValueError(f"loguniform needs bounds above 0, got {list(bounds)}")
        return self

    def named(self) -> tuple[str, tuple[float, ...]]:
        """Return the name of the given distribution, and its bounds or choices."""
        (name,) = self.model_fields_set
        return name, getattr(self, name)


Candidates = Annotated[tuple[float, ...], Field(min_length=1)] | Distribution


class SearchConfig(Section):
    """Hyper-parameter search on validation patients: equally many candidates for every mode, then frozen.

    Lists form a grid. If any candidate is a distribution, `num_samples` candidates are drawn. A single candidate is used as it is.
    """

    num_labelled: Annotated[tuple[NumLabelled, ...], Field(min_length=1)] = (1,)
    """Numbers of labelled patients at which candidates are compared (first draw), by mean validation Dice."""
    learning_rates: dict[Mode, Candidates] = {
        mode: facts.learning_rates for mode, facts in MODES.items() if facts.trains != "nothing"
    }
    """Candidates for the peak learning rate, by mode: a list, or a distribution such as `{loguniform: [1e-4, 1e-2]}`. prototype has none:
    it trains nothing."""
    space: dict[Setting, Candidates] = {}
    """Candidates for further settings, for the modes that have them; each overrides the setting of its name."""
    num_samples: PositiveInt = 8
    """Number of candidates per mode, if any come from a distribution."""
    searcher: Annotated[str, Field(min_length=1)] = "grid"
    """Search algorithm. grid: the lists, or draws that depend only on the seed. Under Ray, also the name of a search algorithm of Ray
    Tune, such as optuna, which learns from earlier candidates. It is seeded, too; its package must be installed."""
    scheduler: Annotated[str, Field(min_length=1)] = "none"
    """Scheduler that stops candidates early: none, asha, or the name of another scheduler of Ray Tune. Works only under Ray; in one
    process every candidate is trained to its end."""
    scheduler_options: dict[str, float | int | str | bool] = {}
    """Arguments of the scheduler, such as `{reduction_factor: 3, grace_period: 2}`; its time is counted in reports."""
    report_steps: PositiveInt = 50
    """Optimizer steps between two intermediate validations, for the scheduler."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for mode, rates in self.learning_rates.items():
            if MODES[mode].trains == "nothing":
                raise ValueError(f"learning_rates has candidates for {mode}, which trains nothing: take them out")
            given = rates.named()[1] if isinstance(rates, Distribution) else rates
            if min(given) <= 0:
                raise ValueError(f"learning_rates.{mode} must be above 0, got {min(given):g}")
        for name, candidates in (*self.learning_rates.items(), *self.space.items()):
            if not isinstance(candidates, Distribution) and len(set(candidates)) < len(candidates):
                raise ValueError(f"the candidates of {name} must differ, got {list(candidates)}")
        numbers = {len(rates) for rates in self.learning_rates.values() if not isinstance(rates, Distribution)}
        if len(numbers) > 1 and not self.space and not self.is_drawn:
            raise ValueError(
                "learning_rates must hold equally many candidates for every mode: a fair comparison searches equally"
            )
        if (self.scheduler != "none" or self.searcher != "grid") and len(self.num_labelled) > 1:
            raise ValueError(
                f"a scheduler or searcher compares results of one kind: search.num_labelled must hold one number, "
                f"got {list(self.num_labelled)}"
            )
        return self

    @property
    def is_drawn(self) -> bool:
        """True if at least one setting is drawn from a distribution."""
        return any(isinstance(found, Distribution) for found in (*self.learning_rates.values(), *self.space.values()))
