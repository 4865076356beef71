# The Python package (bindings/python): its tests, and a wheel that holds the library.

.PHONY: test-bindings wheel
test-bindings: $(BUILD)/libplora.so $(BUILD)/venv-peers/ready
	@PLORA_LIBRARY=$(abspath $<) PYTHONPATH=bindings/python PYTHONDONTWRITEBYTECODE=1 CC='$(CC)' \
	    $(BUILD)/venv-peers/bin/python -m pytest -q -p no:cacheprovider --disable-warnings bindings/python/tests
wheel: $(BUILD)/libplora.so
	PLORA_LIBRARY=$(abspath $<) $(PYTHON) -m pip wheel --no-deps --disable-pip-version-check -w $(BUILD)/wheels ./bindings/python
