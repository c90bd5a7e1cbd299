# What the runs share: the world and its pairs, the base, the tokens, the reference pass, the reference's answers.


rule world_corpus:
    output:
        corpus=WORLD / "sft.jsonl",
        tokenizer=WORLD / "tokenizer" / "tokenizer.json",
        settings=WORLD / "world.json",
    log:
        log_of("world_corpus"),
    conda:
        ENVIRONMENT
    params:
        code=code("world_corpus"),
        directory=lambda wildcards, output: Path(output.corpus).parent,
        world=lambda wildcards: study.decides_world("corpus", draw_of(wildcards)),
        own="--own" if study.own_worlds else "--no-own",
    shell:
        "python -m discobeta world corpus --output {params.directory} --seed {params.world[seed]}"
        " --sft-examples {params.world[sft_examples]} --noise {params.world[noise]} --labels {params.world[labels]}"
        " --flips {params.world[flips]} --qualities {params.world[qualities]} {params.own} &> {log}"


rule sft:
    input:
        corpus_files,
    output:
        BASE_FOLDER / "provenance.json",
    log:
        log_of("sft"),
    conda:
        ENVIRONMENT
    params:
        code=code(BASE_STAGE),
        decides=lambda wildcards: as_text(study.base_config(draw_of(wildcards)).settings_of("training")),
        settings=lambda wildcards, threads: as_text(study.base_config(draw_of(wildcards)).resolved()),
    shell:
        "printf %s {params.settings:q} | python -m discobeta train - &> {log}"


rule world_pairs:
    input:
        world=rules.world_corpus.output.settings,
        base=BASE,
    output:
        DATA / "seed-{seed}" / "pairs" / "train.jsonl",
        DATA / "seed-{seed}" / "pairs" / "eval.jsonl",
        [DATA / "seed-{seed}" / "pairs" / "calibration.jsonl"] if study.has_calibration() else [],
    log:
        LOGS / "world_pairs" / "seed-{seed}.log",
    conda:
        ENVIRONMENT
    params:
        code=code("world_pairs"),
        world=lambda wildcards: study.world_of(draw_of(wildcards)),
        base=lambda wildcards: study.model_of(draw_of(wildcards))["model_name_or_path"],
        directory=lambda wildcards, output: Path(output[0]).parent,
        sizes=study.decides_world("pairs"),
        every_prompt="--every-prompt" if study.decides_world("pairs").get("every_prompt") else "--no-every-prompt",
    shell:
        "python -m discobeta world pairs --world {params.world} --base {params.base:q} --output {params.directory}"
        " --seed {wildcards.seed} --train {params.sizes[train]} --eval {params.sizes[evaluation]}"
        " --calibration {params.sizes[calibration]} {params.every_prompt} &> {log}"


rule prepare:
    input:
        row_files(study.data),
        BASE,
    output:
        DATA / "{draw}" / "tokens" / "tokens.json",
        DATA / "{draw}" / "tokens" / "train.parquet",
        DATA / "{draw}" / "tokens" / "eval.parquet",
        [DATA / "{draw}" / "tokens" / "calibration.parquet"] if study.has_calibration() else [],
    log:
        LOGS / "prepare" / "{draw}.log",
    conda:
        ENVIRONMENT
    params:
        code=code("prepare"),
        decides=decides_of(study.prepare_settings),
        settings=settings_of(study.prepare_settings),
    shell:
        "printf %s {params.settings:q} | python -m discobeta prepare - &> {log}"


use rule prepare as prepare_prompts with:
    input:
        row_files(study.prompt_data),
        BASE,
    output:
        DATA / "{draw}" / "prompts" / "tokens.json",
        DATA / "{draw}" / "prompts" / "train.parquet",
        DATA / "{draw}" / "prompts" / "eval.parquet",
    log:
        LOGS / "prepare_prompts" / "{draw}.log",
    params:
        code=code("prepare"),
        decides=decides_of(study.prompt_settings),
        settings=settings_of(study.prompt_settings),


rule reference:
    input:
        BASE,
        tokens=rules.prepare.output,
    output:
        DATA / "{draw}" / "reference" / "reference.json",
        DATA / "{draw}" / "reference" / "train.safetensors",
        DATA / "{draw}" / "reference" / "eval.safetensors",
        [DATA / "{draw}" / "reference" / "calibration.safetensors"] if study.has_calibration() else [],
    log:
        LOGS / "reference" / "{draw}.log",
    conda:
        ENVIRONMENT
    params:
        code=code("reference"),
        decides=decides_of(study.reference_settings),
        settings=settings_of(study.reference_settings),
    shell:
        "printf %s {params.settings:q} | python -m discobeta reference - &> {log}"


rule answers:
    input:
        BASE,
        lambda wildcards: study.answers_rows(**wildcards) / "tokens.json",
    output:
        study.shared_directory / "answers" / "{stage}" / "seed-{seed}" / "answers.json",
        study.shared_directory / "answers" / "{stage}" / "seed-{seed}" / "responses.safetensors",
    log:
        LOGS / "answers" / "{stage}" / "seed-{seed}.log",
    conda:
        ENVIRONMENT
    params:
        code=code("answers"),
        decides=decides_of(study.answers_settings),
        settings=settings_of(study.answers_settings),
    shell:
        "printf %s {params.settings:q} | python -m discobeta answers - &> {log}"
