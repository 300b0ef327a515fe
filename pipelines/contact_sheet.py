r"""Show generations of the same prompts side by side in one picture.

    python -m pipelines.contact_sheet compare --generations s3://d2f/generations/base s3://d2f/generations/flow \
        --output s3://d2f/contact_sheet.png
"""

from d2f_core.flow.generate.config import ContactSheetConfig
from pipelines.cli import run_job

CONTACT_SHEET = {
    "compare": ContactSheetConfig(
        generations=("s3://d2f/generations/base", "s3://d2f/generations/flow"), output="s3://d2f/contact_sheet.png"
    )
}


def check(config: ContactSheetConfig) -> None:
    from d2f_core.flow.generate.contact_sheet import check_contact_sheet

    check_contact_sheet(config)


def main(config: ContactSheetConfig) -> str:
    from d2f_core.flow.generate.contact_sheet import check_contact_sheet, make_contact_sheet

    return make_contact_sheet(check_contact_sheet(config))


if __name__ == "__main__":
    run_job("contact_sheet", CONTACT_SHEET, main, check)
