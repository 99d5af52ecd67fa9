# SPDX-License-Identifier: GPL-2.0
#
# Reads the kernel's bindings_generated.rs and prints one regular expression of the names of all types that
# it defines in full. A type that it only declares (`_unused: [u8; 0]`) is not among them.

/^pub (struct|union) / {
	name = $3
	sub(/[^A-Za-z0-9_].*/, "", name)
	next
}
name != "" {
	if ($0 !~ /_unused: \[u8; 0\]/)
		names[name]
	name = ""
}
/^pub type / {
	alias = $3
	sub(/[^A-Za-z0-9_].*/, "", alias)
	names[alias]
}
/^pub use self::/ {
	alias = $NF
	sub(/;$/, "", alias)
	names[alias]
}
END {
	for (n in names) {
		printf "%s%s", sep, n
		sep = "|"
	}
	print ""
}
