// Shows the description of the API with Swagger UI, which comes with the Python package fastapi-offline.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, layout: "BaseLayout" });
