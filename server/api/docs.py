"""`GET /docs`: the OpenAPI document for people, with Swagger's files from an installed package and nothing from elsewhere."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from starlette.responses import HTMLResponse

from .auth import public

_FILES = "/docs/static"
_PACKAGE = ("fastapi_offline", "static")  # its files; none of its code


def install(app: FastAPI) -> None:
    """Serve the page and its files, also behind a proxy that strips a prefix (`root_path`)."""
    app.mount(_FILES, StaticFiles(packages=[_PACKAGE]), name="docs")

    @app.get("/docs", include_in_schema=False)
    @public
    async def page(request: Request) -> HTMLResponse:
        root = str(request.scope.get("root_path", "")).rstrip("/")
        return get_swagger_ui_html(
            openapi_url=f"{root}/openapi.json",
            title=app.title,
            swagger_js_url=f"{root}{_FILES}/swagger-ui-bundle.js",
            swagger_css_url=f"{root}{_FILES}/swagger-ui.css",
            swagger_favicon_url=f"{root}{_FILES}/favicon.png",
            swagger_ui_parameters={"validatorUrl": None},  # no document of ours is sent to swagger.io
        )
