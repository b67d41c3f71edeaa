from models.evaluation.tables import accuracy_table, calibration_summary, cascade_table
from models.profiles import CascadeProfile, ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork


def test_the_accuracy_table_has_a_row_per_keep_rate_and_a_column_per_grid() -> None:
    rows = (
        SubNetworkProfile(SubNetwork(8, 0.5), 742_000_000, 0.7375),
        SubNetworkProfile(SubNetwork(8, 1.0), 1_438_000_000, 0.7579),
        SubNetworkProfile(SubNetwork(14, 1.0), 4_599_000_000),
    )
    assert accuracy_table(ProfileTable(rows)).splitlines() == [
        "keep rate              grid 8             grid 14",
        "      0.5     73.75 % 0.742 G                   -",
        "        1     75.79 % 1.438 G           ? 4.599 G",
    ]


def test_the_calibration_summary_gives_the_extremes() -> None:
    rows = (
        SubNetworkProfile(SubNetwork(8, 0.5), 1, 0.7, temperature=0.9, calibration_error=0.0123),
        SubNetworkProfile(SubNetwork(8, 1.0), 2, 0.8, temperature=1.25, calibration_error=0.007),
    )
    summary = "expected calibration error 0.70 to 1.23 % at temperatures of 0.900 to 1.250"
    assert calibration_summary(ProfileTable(rows)) == summary


def test_the_cascade_table_has_a_line_of_cost_and_accuracy_per_cascade() -> None:
    first, second = SubNetwork(8, 0.5), SubNetwork(8, 1.0)
    rows = SubNetworkProfile(first, 700_000_000, 0.7), SubNetworkProfile(second, 1_400_000_000, 0.8)
    cascade = CascadeProfile(first, second, threshold=0.85, share=0.25, top1=0.7875)
    assert cascade_table(ProfileTable(rows, (cascade,))) == (
        "     1.05 GFLOPs  78.75 %: grid 8 at keep rate 0.5, then grid 8 at keep rate 1 for the 25.0 % whose "
        "confidence is below 85 %"
    )
    assert cascade_table(ProfileTable(rows)) == ""
