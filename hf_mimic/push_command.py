"""What `hf-mimic push` does: decide as `hf-mimic filter` does, then publish; or publish the scores alone."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from hf_mimic.command_arguments import PushArguments, RuleArguments
from hf_mimic.curated import push_curated_dataset
from hf_mimic.curation import keep_column
from hf_mimic.data import load_rows
from hf_mimic.filter_command import decided_rows, share
from hf_mimic.hub import Published
from hf_mimic.push_options import PushOptions
from hf_mimic.run_record import public_name
from hf_mimic.shared_scores import open_scores, push_scores


def run_push(options: PushArguments, rule: RuleArguments) -> dict[str, Any]:
    """Publish; return the lines of a table, name to value.

    Raises:
        HubError: If it cannot be published; the branch is as it was.
        ValueError: If data set, scores and rule do not fit together, or nothing is kept.
    """
    where = PushOptions(
        revision=options.revision,
        create_pr=options.create_pr,
        private=options.private or None,
        commit_message=options.commit_message,
        split=options.split,
    )
    if options.dataset is None:
        if rule != RuleArguments():
            given = [f"--{e.name}" for e in fields(rule) if getattr(rule, e.name) != getattr(RuleArguments(), e.name)]
            raise ValueError(f"{' and '.join(given)} must come with a --dataset to filter, got none. Name it.")
        table = open_scores(options.scores)
        lines = {"samples": len(table.aggregate()), "visits": len(table)}
        return lines | _told(push_scores(table, options.repo_id, **where))
    given = load_rows(options.dataset, options.split, **options.place)
    rows, table, result = decided_rows(given, options.scores, rule, options.sample_id_column)
    done = push_curated_dataset(
        rows,
        options.repo_id,
        scores=table,
        rule=result,
        sample_id_column=options.sample_id_column,
        label_column=options.label_column,
        group_columns=options.group_columns,
        drop_unscored=rule.drop_unscored,
        config_name=options.config_name,
        original_dataset=public_name(options.dataset),
        num_proc=options.num_proc,
        **where,
    )
    kept = keep_column(rows).fill_null(not rule.drop_unscored)
    return {"rows": len(rows), "kept": share(np.asarray(kept)), "rule": result.rule} | _told(done, options.config_name)


def _told(done: Published, config: str = "default") -> dict[str, Any]:
    lines = {"published" if done.changed else "nothing to do, it is there already": done.url, "commit": done.commit}
    named = "" if config == "default" else f'"{config}", '
    after = f'load_dataset("{done.repo_id}", {named}revision="{done.commit}")'
    return lines | {"repo": done.repo_id, "next": after}
