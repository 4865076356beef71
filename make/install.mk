# make install: header, libraries, pkg-config and CMake files.
LIBDIR ?= $(PREFIX)/lib
INCDIR ?= $(PREFIX)/include
FILL    = sed -e 's|@PREFIX@|$(PREFIX)|g; s|@LIBDIR@|$(LIBDIR)|g; s|@INCDIR@|$(INCDIR)|g' \
              -e 's|@VERSION@|$(VERSION)|g; s|@SONAME@|$(SONAME)|g'

.PHONY: install
install: all
	install -d $(DESTDIR)$(INCDIR) $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(LIBDIR)/cmake/plora
	install -m 644 include/plora.h $(DESTDIR)$(INCDIR)
	install -m 644 $(BUILD)/libplora.a $(DESTDIR)$(LIBDIR)
	install -m 755 $(BUILD)/libplora.so.$(VERSION) $(DESTDIR)$(LIBDIR)
	ln -sf libplora.so.$(VERSION) $(DESTDIR)$(LIBDIR)/$(SONAME)
	ln -sf $(SONAME) $(DESTDIR)$(LIBDIR)/libplora.so
	$(FILL) packaging/plora.pc.in > $(DESTDIR)$(LIBDIR)/pkgconfig/plora.pc
	$(FILL) packaging/ploraConfig.cmake.in > $(DESTDIR)$(LIBDIR)/cmake/plora/ploraConfig.cmake
	$(FILL) packaging/ploraConfigVersion.cmake.in > $(DESTDIR)$(LIBDIR)/cmake/plora/ploraConfigVersion.cmake
