# From all runs to what is read: small, so they are made where snakemake runs. What there is: discobeta.report.outputs.
localrules:
    all,
    tables,
    figures,
    page,


TABLES = study.tables_directory
FIGURES = study.figures_directory


rule tables:
    input:
        results(),
    output:
        [
            in_report(TABLES / table.files[0], table, category="Tables", labels={"table": table.title})
            for table in outputs.tables(study)
        ],
        [TABLES / name for table in outputs.tables(study) for name in table.files[1:]],
        TABLES / "config.yaml",
    log:
        LOGS / "tables.log",
    conda:
        ENVIRONMENT
    params:
        made_by=made_by("tables", outputs.tables(study)),
        study=study_text,
    shell:
        "printf %s {params.study:q} | python -m discobeta tables --strict --configfile - &> {log}"


rule figures:
    input:
        results(),
    output:
        [
            in_report(
                FIGURES / figure.files[0],
                figure,
                category="Figures",
                labels={"figure": figure.title, "stage": figure.stage},
            )
            for figure in outputs.figures(study)
        ],
        [FIGURES / name for figure in outputs.figures(study) for name in figure.files[1:]],
    log:
        LOGS / "figures.log",
    conda:
        ENVIRONMENT
    params:
        made_by=made_by("figures", outputs.figures(study)),
        study=study_text,
    shell:
        "printf %s {params.study:q} | python -m discobeta figures --strict --configfile - &> {log}"


# It shows what tables and figures show: whatever makes these anew makes it anew.
rule page:
    input:
        rules.tables.output,
        rules.figures.output,
    output:
        study.directory / "report.html",
    log:
        LOGS / "page.log",
    conda:
        ENVIRONMENT
    params:
        code=code("page"),
        beside=beside_the_page(),
        study=study_text,
    shell:
        "printf %s {params.study:q} | python -m discobeta page --strict --drawn --configfile - &> {log}"
