# The Python package (bindings/python): its tests, and a wheel that holds the library.
#
# make wheel                  for this distribution: the library's own libraries stay the system's
# make wheel MANYLINUX=1      with them inside, for any Linux whose glibc is as new; libgomp excepted, so that one process has one pool

.PHONY: test-bindings wheel
test-bindings: $(BUILD)/libplora.so $(BUILD)/venv-peers/ready
	@PLORA_LIBRARY=$(abspath $<) PYTHONPATH=bindings/python PYTHONDONTWRITEBYTECODE=1 CC='$(CC)' \
	    $(BUILD)/venv-peers/bin/python -m pytest -q -p no:cacheprovider --disable-warnings bindings/python/tests

WHEELS = $(BUILD)/wheels
$(BUILD)/venv-wheel/ready: bindings/python/requirements-wheel.txt
wheel: $(BUILD)/libplora.so $(if $(MANYLINUX),$(BUILD)/venv-wheel/ready)
	@rm -rf $(WHEELS)
	@PLORA_LIBRARY=$(abspath $<) $(PYTHON) -m pip wheel -q --no-deps --disable-pip-version-check -w $(WHEELS) ./bindings/python
ifdef MANYLINUX
	@PATH="$(abspath $(BUILD))/venv-wheel/bin:$$PATH" auditwheel repair --exclude libgomp.so.1 -w $(WHEELS) $(WHEELS)/plora-*-linux_*.whl \
	    >$(BUILD)/auditwheel.log 2>&1 || { cat $(BUILD)/auditwheel.log; exit 1; }
	@rm $(WHEELS)/plora-*-none-linux_*.whl
	@for wheel in $(WHEELS)/*.whl; do echo "pip install $$wheel"; done
	@echo '    any Python from 3.9, a glibc at least as new as in its name; of the system libgomp.so.1 (Debian: libgomp1)'
else
	@for wheel in $(WHEELS)/*.whl; do echo "pip install $$wheel"; done
	@echo '    any Python from 3.9; of the system:' $$(objdump -p $< | sed -n 's/ *NEEDED  *//p')
endif
