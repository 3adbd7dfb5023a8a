// Package examples holds programs to copy from; see README.md beside this file.
package examples
