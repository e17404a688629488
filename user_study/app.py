"""The rating page: one Gradio component, mounted in the study's service at ``/study``.

Gradio only brings the page; votes never pass through its queue, which loses calls whose tab is closed.
"""

from __future__ import annotations

import os
from importlib.resources import files

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from fastapi import FastAPI

from user_study.service import create_service
from user_study.study import ServedStudy

_SCRIPTS = ("outbox.js", "zoom.js", "study.js")  # one after the other in one scope; the last one starts


def create_app(study: ServedStudy, admin_password: str | None = None) -> FastAPI:
    """Build the whole application: the service with its admin page, and the rating page on top of it."""
    app: FastAPI = gr.mount_gradio_app(
        create_service(study, admin_password),
        _page(),
        path="/study",
        head=f"<style>{_part('study.css')}</style>",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        max_file_size=1,  # nobody has anything to upload
    )
    return app


def _page() -> gr.Blocks:
    with gr.Blocks(title="Picture study", analytics_enabled=False) as page:
        gr.HTML(
            html_template=_part("study.html"),
            js_on_load="\n".join(map(_part, _SCRIPTS)),
            apply_default_css=False,
            elem_classes="study-page",
        )
    return page


def _part(name: str) -> str:
    return files("user_study").joinpath("page", name).read_text(encoding="utf-8")
