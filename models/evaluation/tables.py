"""Text that `supervit evaluate` prints about a measured profile."""

from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork


def accuracy_table(profile: ProfileTable) -> str:
    """Format top-1 in percent with the GFLOPs beside it: a row per keep rate, a column per patch grid."""
    rows = profile.by_subnetwork
    grids = sorted({subnetwork.patch_grid for subnetwork in rows})
    rates = sorted({subnetwork.keep_rate for subnetwork in rows})
    lines = ["keep rate" + "".join(f"{f'grid {grid}':>20}" for grid in grids)]
    for rate in rates:
        cells = [rows.get(SubNetwork(grid, rate)) for grid in grids]
        lines.append(f"{rate:9.4g}" + "".join(f"{_cell(cell):>20}" for cell in cells))
    return "\n".join(lines)


def calibration_summary(profile: ProfileTable) -> str:
    """Summarise in one line how well the probabilities of a measured profile are calibrated."""
    temperatures = [row.temperature for row in profile.rows]
    errors = [row.calibration_error for row in profile.rows if row.calibration_error is not None]
    return (
        f"expected calibration error {100 * min(errors):.2f} to {100 * max(errors):.2f} % "
        f"at temperatures of {min(temperatures):.3f} to {max(temperatures):.3f}"
    )


def _cell(row: SubNetworkProfile | None) -> str:
    if row is None:
        return "-"
    accuracy = "?" if row.top1 is None else f"{100 * row.top1:.2f} %"
    return f"{accuracy} {row.gflops:.4g} G"


def cascade_table(profile: ProfileTable) -> str:
    """Format the cascades of a profile, one per line, cheapest first; empty where there are none."""
    lines = [
        f"{profile.expected_gflops(one):9.4g} GFLOPs {100 * one.top1:6.2f} %: {one.first}, then {one.second} for the "
        f"{100 * one.share:.1f} % whose confidence is below {100 * one.threshold:g} %"
        for one in profile.cascades
    ]
    return "\n".join(lines)
