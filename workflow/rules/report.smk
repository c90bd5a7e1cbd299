# From all runs to what is read: small, so they are made where snakemake runs. What there is: discobeta.report.outputs.
localrules:
    all,
    tables,
    figures,


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
