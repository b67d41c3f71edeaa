from pydantic_settings import BaseSettings, CliSubCommand, SettingsConfigDict, get_subcommand

from service.simulation.options import Simulate


def test_the_options_are_read_from_a_command_line() -> None:
    class Cli(BaseSettings):
        model_config = SettingsConfigDict(cli_kebab_case=True, cli_avoid_json=True, cli_implicit_flags=True)
        simulate: CliSubCommand[Simulate]

    line = "simulate --rate 50,100.5 --budget-ms 50,500 --slowdown 10:2,20:1 --compare slackfit,fixed-14-1 --machines 2"
    command = get_subcommand(Cli(_cli_parse_args=line.split()))
    assert command == Simulate(
        rate=(50, 100.5), budget_ms=(50, 500), slowdown="10:2,20:1", compare=("slackfit", "fixed-14-1"), machines=2
    )
