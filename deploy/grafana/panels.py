"""The kinds of panels on the dashboard, and PromQL for their queries."""

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models

SOURCE = models.DataSourceRef(type_val="prometheus", uid="prometheus")
HALF, THIRD, QUARTER = 12, 8, 6  # widths, in Grafana's 24 columns

ONES = '{job=~"$job", instance=~"$instance"}'
RATE = "[$__rate_interval]"


def rate(metric: str, *labels: str, by: str = "") -> str:
    """Write PromQL for the summed rate of a counter."""
    chosen = ", ".join(['job=~"$job"', 'instance=~"$instance"', *labels])
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{chosen}}}{RATE}))"


def growth(metric: str, by: str) -> str:
    """Write PromQL for the growth of a counter over six hours, as in the alerts on rare events."""
    return f"sum by ({by}) (increase({metric}{ONES}[6h]))"


def quantile(share: float, histogram: str, by: str = "") -> str:
    """Write PromQL for a quantile over all servers."""
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', by=f'le, {by}' if by else 'le')})"


def mean(histogram: str, by: str = "") -> str:
    """Write PromQL for a mean over all servers."""
    return f"{rate(f'{histogram}_sum', by=by)} / {rate(f'{histogram}_count', by=by)}"


def each(metric: str, legend: str = "") -> dict[str, str]:
    """Write the legend and PromQL of a gauge, one line per server."""
    return {f"{legend}{{{{instance}}}}": metric + ONES}


def of_served(metric: str) -> str:
    """Write PromQL that keeps, of a gauge by model, the one that is served; others were served earlier."""
    served = f'label_replace(supervit_model_info{ONES} == 1, "model", "$1", "name", "(.*)")'
    return f"({metric}{ONES} and on (job, instance, model) {served})"


def query(expression: str, legend: str) -> prometheus.Dataquery:
    """Make a query."""
    return prometheus.Dataquery().expr(expression).legend_format(legend)


def number(title: str, description: str, expression: str, unit: str = "percentunit", decimals: int = 2) -> stat.Panel:
    """Make a panel of one number, the current value."""
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
    """Make a panel of lines over time, from PromQL expressions by legend."""
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
    """Make a menu of the values of a label, all of them selected at first."""
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
