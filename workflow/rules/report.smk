# From all runs to what is read: small, so they are made where snakemake runs.
localrules:
    all,
    tables,
    figures,


TABLES = study.directory / "tables"
FIGURES = study.directory / "figures"


rule tables:
    input:
        results(),
    output:
        [
            report(TABLES / f"{name}.csv", category="Tables", labels={"table": name}, caption=caption(name))
            for name in TABLE_NAMES
        ],
        [TABLES / f"{name}.{kind}" for name in TABLE_NAMES for kind in ("md", "tex")],
        report(TABLES / "metrics.csv", category="Tables", labels={"table": "every number"}, caption=caption("metrics")),
        TABLES / "config.yaml",
    log:
        LOGS / "tables.log",
    conda:
        ENVIRONMENT
    params:
        code=code("tables"),
        study=study_text,
    shell:
        "printf %s {params.study:q} | python -m discobeta tables --strict --configfile - &> {log}"


rule figures:
    input:
        results(),
    output:
        [
            report(
                FIGURES / f"{name}-{stage}.svg",
                category="Figures",
                labels={"figure": name.replace("-", " "), "stage": stage},
                caption=caption(name, stage),
            )
            for name, stage in FIGURE_NAMES
        ],
        [FIGURES / f"{name}-{stage}.{kind}" for name, stage in FIGURE_NAMES for kind in ("pdf", "png")],
    log:
        LOGS / "figures.log",
    conda:
        ENVIRONMENT
    params:
        code=code("figures"),
        study=study_text,
    shell:
        "printf %s {params.study:q} | python -m discobeta figures --strict --configfile - &> {log}"
