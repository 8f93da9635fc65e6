// Package docs holds the documents to what they say of the code.
package docs
