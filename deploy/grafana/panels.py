"""What the panels of the dashboard have in common, and the queries that they ask."""

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models

SOURCE = models.DataSourceRef(type_val="prometheus", uid="prometheus")
HALF, THIRD, QUARTER = 12, 8, 6  # of Grafana's 24 columns

ONES = '{job=~"$job", instance=~"$instance"}'
RATE = "[$__rate_interval]"


def rate(metric: str, *labels: str, by: str = "") -> str:
    """Write the summed rate of a counter."""
    chosen = ", ".join(['job=~"$job"', 'instance=~"$instance"', *labels])
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{chosen}}}{RATE}))"


def growth(metric: str, by: str) -> str:
    """Write by how much a counter grew in six hours, as the alerts have it of what happens seldom."""
    return f"sum by ({by}) (increase({metric}{ONES}[6h]))"


def quantile(share: float, histogram: str, by: str = "") -> str:
    """Write a quantile over all servers."""
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', by=f'le, {by}' if by else 'le')})"


def mean(histogram: str, by: str = "") -> str:
    """Write a mean over all servers."""
    return f"{rate(f'{histogram}_sum', by=by)} / {rate(f'{histogram}_count', by=by)}"


def each(metric: str, legend: str = "") -> dict[str, str]:
    """Write a gauge of each server."""
    return {f"{legend}{{{{instance}}}}": metric + ONES}


def query(expression: str, legend: str) -> prometheus.Dataquery:
    """Make a query."""
    return prometheus.Dataquery().expr(expression).legend_format(legend)


def number(title: str, description: str, expression: str, unit: str = "percentunit", decimals: int = 2) -> stat.Panel:
    """Make a panel of one number, that of this moment."""
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .decimals(decimals)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .span(QUARTER)
        .height(4)
        .with_target(query(expression, title).instant())
    )


def lines(
    title: str, description: str, unit: str, queries: dict[str, str], *, stacked: bool = False, span: int = HALF
) -> timeseries.Panel:
    """Make a panel of lines over time, from expressions by their legend."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .span(span)
        .height(8)
        .show_points(options.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(options.LegendDisplayMode.TABLE)
            .placement(options.LegendPlacement.RIGHT)
            .show_legend(True)
            .calcs(["lastNotNull"])
        )
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI))
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL)).fill_opacity(40)
    for letter, (legend, expression) in zip("ABCDEFGH", queries.items(), strict=False):
        panel = panel.with_target(query(expression, legend).range().ref_id(letter))
    return panel


def variable(name: str, label: str, of: str) -> dashboard.QueryVariable:
    """Make a menu of the values of a label, all of them chosen at first."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(f"label_values({of}, {name})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".+")
    )
