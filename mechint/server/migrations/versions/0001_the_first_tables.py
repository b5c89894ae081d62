"""The first tables"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "revision",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "saes",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("hf_repo_id", sa.String(length=500), nullable=True),
        sa.Column("hf_filepath", sa.String(length=1000), nullable=True),
        sa.Column("hf_revision", sa.String(length=255), nullable=True),
        sa.Column("training_id", sa.String(length=500), nullable=True),
        sa.Column("model_name", sa.String(length=255), nullable=True),
        sa.Column("model_id", sa.String(length=255), nullable=True),
        sa.Column("layer", sa.Integer(), nullable=True),
        sa.Column("hook_type", sa.String(length=32), nullable=True),
        sa.Column("hook_name", sa.String(length=255), nullable=True),
        sa.Column("n_features", sa.Integer(), nullable=True),
        sa.Column("d_model", sa.Integer(), nullable=True),
        sa.Column("architecture", sa.String(length=64), nullable=True),
        sa.Column("format", sa.String(length=32), nullable=True),
        sa.Column("local_path", sa.String(length=1000), nullable=True),
        sa.Column("file_size_bytes", sa.BigInteger(), nullable=True),
        sa.Column("progress", sa.Float(), nullable=False),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("sae_metadata", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("downloaded_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_saes_created_at", "saes", ["created_at"])
    op.create_index("ix_saes_model_name", "saes", ["model_name"])
    op.create_index("ix_saes_status_created", "saes", ["status", "created_at"])
    op.create_index("ix_saes_training_id", "saes", ["training_id"])

    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("sae_id", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("progress", sa.Float(), nullable=False),
        sa.Column("bytes_done", sa.BigInteger(), nullable=False),
        sa.Column("bytes_total", sa.BigInteger(), nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("error_code", sa.String(length=64), nullable=True),
        sa.Column("params", sa.JSON(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("token_cipher", sa.Text(), nullable=True),
        sa.Column("token_until", sa.Float(), nullable=True),
        sa.Column("worker_id", sa.String(length=255), nullable=True),
        sa.Column("lease_until", sa.Float(), nullable=True),
        sa.Column("not_before", sa.Float(), nullable=False),
        sa.Column("woken_at", sa.Float(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["sae_id"],
            ["saes.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_jobs_sae_id", "jobs", ["sae_id"])
    op.create_index("ix_jobs_seq", "jobs", ["seq"])
    op.create_index("ix_jobs_state_lease", "jobs", ["state", "lease_until"])

    op.execute("INSERT INTO revision (id, value) VALUES (1, 0)")


def downgrade() -> None:
    op.drop_index("ix_jobs_state_lease", "jobs")
    op.drop_index("ix_jobs_seq", "jobs")
    op.drop_index("ix_jobs_sae_id", "jobs")

    op.drop_table("jobs")
    op.drop_index("ix_saes_training_id", "saes")
    op.drop_index("ix_saes_status_created", "saes")
    op.drop_index("ix_saes_model_name", "saes")
    op.drop_index("ix_saes_created_at", "saes")

    op.drop_table("saes")
    op.drop_table("revision")
