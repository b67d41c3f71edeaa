import io

import pytest
from rich.console import Console

from service.bench.figures import Figures
from service.bench.generator import Exchange, Planned
from service.bench.table import table_of
from service.bench.wires import Reply
from service.simulation.arrivals import Arrival


@pytest.mark.parametrize(("late_s", "warned"), [(0.002, False), (0.05, True)])
def test_a_generator_that_cannot_keep_up_says_so(late_s: float, warned: bool) -> None:
    exchange = Exchange(Planned(Arrival(0.0, 0.1), 0, None), late_s, 0.06, Reply("ok"))
    output = io.StringIO()
    Console(file=output, width=200).print(table_of([Figures.of(10, [exchange], 1)]))
    assert ("could not keep up" in " ".join(output.getvalue().split())) == warned
